// Memory for a page pool, left as the system gives it: untouched pages take no memory, and no time.

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error Reserve(ffi::Result<ffi::AnyBuffer> pool) {
#if defined(__linux__)  // large pages: fewer faults, and a pool is read in pieces that are far apart
  constexpr std::uintptr_t kPage = 4096;
  const auto start = (reinterpret_cast<std::uintptr_t>(pool->untyped_data()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(pool->untyped_data()) + pool->size_bytes()) / kPage * kPage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxReserve, Reserve, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
