// Writes a step's keys and values into the page pool for CPUs, called by XLA through its foreign-function interface.
//
// XLA makes rows of keys and values, widens and scatters them, three loops for a few kB. Here each row is written once. The pool is
// operand and result in one.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// `size` numbers of a row, to float32.
void Copy(const void* source, bool is_wide, int64_t first, int64_t size, float* to) {
  if (is_wide) {
    std::memcpy(to, static_cast<const float*>(source) + first, size * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source) + first;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

ffi::Error KvWrite(ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::F32> pages,
                   ffi::ResultBuffer<ffi::F32> out) {
  const int64_t tokens = keys.dimensions()[0], size = keys.dimensions()[1] * keys.dimensions()[2];
  const int64_t num_slots = pages.dimensions()[0] * pages.dimensions()[1];
  const bool is_wide = keys.element_type() == ffi::F32;
  if ((!is_wide && keys.element_type() != ffi::BF16) || values.element_type() != keys.element_type())
    return ffi::Error::InvalidArgument("keys and values must both be float32 or bfloat16");
  float* const pool = out->typed_data();
  if (pool != pages.typed_data()) return ffi::Error::InvalidArgument("the pool must be operand and result in one");
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slots.typed_data()[token];
    if (slot < 0 || slot >= num_slots) continue;  // padding
    Copy(keys.untyped_data(), is_wide, token * size, size, pool + slot * 2 * size);
    Copy(values.untyped_data(), is_wide, token * size, size, pool + (slot * 2 + 1) * size);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxKvWrite, KvWrite,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
