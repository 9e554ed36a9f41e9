// Writes a step's keys and values into the page pool for CPUs, called by XLA through its foreign-function interface.
//
// XLA makes rows of keys and values, widens and scatters them, three loops for a few kB. Here each row is written once. The pool is
// operand and result in one.

#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

void Store(float x, float* to) { *to = x; }
void Store(float x, uint16_t* to) {  // the nearest bfloat16, of two the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *to = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Problem {
  const void *keys, *values;  // [T, K·H]
  const int32_t* slots;       // [T]
  void* pages;                // [P·G, 2·K·H]
  int64_t num_tokens, num_slots, size;
};

template <typename From, typename To>
void Write(const Problem& p) {
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) continue;  // padding
    To* to = static_cast<To*>(p.pages) + slot * 2 * p.size;
    for (const void* source : {p.keys, p.values}) {
      const From* from = static_cast<const From*>(source) + token * p.size;
      if constexpr (std::is_same_v<From, To>)
        std::memcpy(to, from, sizeof(To) * p.size);
      else
        for (int64_t i = 0; i < p.size; ++i) Store(pjax::Load1(from + i), to + i);
      to += p.size;
    }
  }
}

ffi::Error KvWrite(ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> slots, ffi::AnyBuffer pages,
                   ffi::Result<ffi::AnyBuffer> out) {
  const bool is_wide = keys.element_type() == ffi::F32, pages_are_wide = pages.element_type() == ffi::F32;
  if ((!is_wide && keys.element_type() != ffi::BF16) || values.element_type() != keys.element_type() ||
      (!pages_are_wide && pages.element_type() != ffi::BF16))
    return ffi::Error::InvalidArgument("keys, values and pages must be float32 or bfloat16");
  if (out->untyped_data() != pages.untyped_data()) return ffi::Error::InvalidArgument("the pool must be operand and result in one");
  const Problem p{keys.untyped_data(), values.untyped_data(), slots.typed_data(), out->untyped_data(), keys.dimensions()[0],
                  pages.dimensions()[0] * pages.dimensions()[1], keys.dimensions()[1] * keys.dimensions()[2]};
  if (is_wide)
    pages_are_wide ? Write<float, float>(p) : Write<float, uint16_t>(p);
  else
    pages_are_wide ? Write<uint16_t, float>(p) : Write<uint16_t, uint16_t>(p);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxKvWrite, KvWrite,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
