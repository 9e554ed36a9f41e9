// Memory for a page pool, left as the system gives it: untouched pages take no memory, and no time.

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error Reserve(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxReserve, Reserve, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

// Of the headers that the library was built with.
extern "C" std::int32_t PjaxFfiVersion() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// Asks for large pages from here on, and in place of what was touched already: fewer faults, and a pool is read in pieces that are
// far apart. A system that does not know one or the other refuses it, and nothing is lost.
extern "C" void PjaxUseLargePages(void* pool, std::uint64_t num_bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = 4096;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const auto first = (reinterpret_cast<std::uintptr_t>(pool) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(pool) + num_bytes) / kPage * kPage;
  if (end <= first) return;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(first), end - first, kCollapse);
#endif
}

// Has the system give all of it now: a fault for each of its pages, as a step's own writes would have. What was written stays, even
// while others write. (One madvise for all of it keeps every other thread from mapping memory as long as it takes.)
extern "C" void PjaxTouch(void* pool, std::uint64_t num_bytes) {
  constexpr std::uint64_t kPage = 4096;
  auto* bytes = static_cast<unsigned char*>(pool);
  for (std::uint64_t at = 0; at < num_bytes; at += kPage) __atomic_fetch_or(bytes + at, 0, __ATOMIC_RELAXED);
}
