// Memory for a page pool, left as the system gives it: untouched pages take no memory, and no time.

#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error Reserve(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

// The system's pages that lie wholly inside: their address, and bytes.
std::pair<void*, std::uint64_t> WholePages(void* pool, std::uint64_t num_bytes) {
  constexpr std::uintptr_t kPage = 4096;
  const auto first = (reinterpret_cast<std::uintptr_t>(pool) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(pool) + num_bytes) / kPage * kPage;
  return {reinterpret_cast<void*>(first), end > first ? end - first : 0};
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxReserve, Reserve, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());

// Asks for large pages from here on, and in place of what was touched already: fewer faults, and a pool is read in pieces that are
// far apart. A system that does not know one or the other refuses it, and nothing is lost.
extern "C" void PjaxUseLargePages(void* pool, std::uint64_t num_bytes) {
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const auto [first, size] = WholePages(pool, num_bytes);
  if (size == 0) return;
  madvise(first, size, MADV_HUGEPAGE);
  madvise(first, size, kCollapse);
#endif
}

// Has the system give all of it now, zeros where nothing was written. Refused by systems that do not know it (Linux has since 5.14).
extern "C" void PjaxTouch(void* pool, std::uint64_t num_bytes) {
#if defined(__linux__)
  constexpr int kPopulate = 23;  // MADV_POPULATE_WRITE
  if (const auto [first, size] = WholePages(pool, num_bytes); size > 0) madvise(first, size, kPopulate);
#endif
}
