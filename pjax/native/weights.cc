// A checkpoint's numbers as parameters, called through ctypes from the threads that load: cast or dequantised straight into the memory
// where they stay, and checked, in one pass and without the interpreter's lock.

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

using namespace pjax;

constexpr int kGroup = 32;  // numbers that are taken at a time, and a block of GGUF's

// As pjax/checkpoints/copying.py numbers them.
enum Kind : std::int32_t { kFloat32, kFloat16, kBfloat16, kQ8_0, kQ4_0, kQ4_1 };

PJAX_INLINE float FromHalf(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  const float tiny = static_cast<float>(static_cast<std::int32_t>(rest)) * 0x1p-24f;  // exact; no denormal float anywhere
  std::uint32_t small;
  std::memcpy(&small, &tiny, 4);
  const std::uint32_t normal = (rest << 13) + (112u << 23), special = (rest << 13) | 0x7f800000u;
  const std::uint32_t bits = sign | (rest < 0x400u ? small : rest < 0x7c00u ? normal : special);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

PJAX_INLINE float HalfAt(const unsigned char* from) {
  std::uint16_t half;
  std::memcpy(&half, from, 2);
  return FromHalf(half);
}

// What was computed so far is rounded before anything is added to it, as numpy does.
PJAX_INLINE void Rounded(float* numbers) { asm volatile("" : : "r"(numbers) : "memory"); }

// kGroup numbers of a kind. Those of two bytes are widened a group at a time; the rest of a last group is not looked at.
template <Kind kKind>
struct Source {
  static constexpr int kBytes = kKind == kFloat32 ? 4 * kGroup : kKind == kQ8_0 ? 34 : kKind == kQ4_0 ? 18 : kKind == kQ4_1 ? 20 : 2 * kGroup;

  static PJAX_INLINE void Get(const unsigned char* from, float* to) {
    if constexpr (kKind == kFloat32) {
      std::memcpy(to, from, kBytes);
    } else if constexpr (kKind == kFloat16 || kKind == kBfloat16) {
      std::uint16_t halves[kGroup];
      std::memcpy(halves, from, kBytes);
      for (int i = 0; i < kGroup; ++i) to[i] = kKind == kFloat16 ? FromHalf(halves[i]) : Load1(halves + i);
    } else if constexpr (kKind == kQ8_0) {
      const float scale = HalfAt(from);
      for (int i = 0; i < kGroup; ++i) to[i] = scale * static_cast<float>(static_cast<std::int8_t>(from[2 + i]));
    } else {
      constexpr int kHeader = kKind == kQ4_1 ? 4 : 2, kZero = kKind == kQ4_1 ? 0 : 8;
      const float scale = HalfAt(from);
      for (int i = 0; i < kGroup / 2; ++i) {
        to[i] = scale * static_cast<float>((from[kHeader + i] & 15) - kZero);
        to[i + kGroup / 2] = scale * static_cast<float>((from[kHeader + i] >> 4) - kZero);
      }
      if constexpr (kKind == kQ4_1) {
        const float least = HalfAt(from + 2);
        Rounded(to);
        for (int i = 0; i < kGroup; ++i) to[i] += least;
      }
    }
  }
};

// Stores kGroup numbers as float32; how many of them are NaN or infinite.
template <bool>
PJAX_INLINE std::int32_t Put(const float* numbers, float* to) {
  std::uint32_t bits[kGroup];
  std::memcpy(bits, numbers, sizeof bits);
  std::int32_t bad = 0;
  for (int i = 0; i < kGroup; ++i) bad += (bits[i] & 0x7f800000u) == 0x7f800000u;
  std::memcpy(to, bits, sizeof bits);
  return bad;
}

// The same as bfloat16, rounded to the nearest, ties to even; numbers that were bfloat16 keep all bits.
template <bool kExact>
PJAX_INLINE std::int32_t Put(const float* numbers, std::uint16_t* to) {
  std::uint32_t bits[kGroup];
  std::memcpy(bits, numbers, sizeof bits);
  std::int32_t bad = 0;
  for (int i = 0; i < kGroup; ++i) {
    const std::uint32_t nearest = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16, nan = ((bits[i] >> 16) & 0x8000u) | 0x7fc0u;
    bits[i] = kExact ? bits[i] >> 16 : (bits[i] & 0x7fffffffu) > 0x7f800000u ? nan : nearest;
    bad += (bits[i] & 0x7f80u) == 0x7f80u;
  }
  for (int i = 0; i < kGroup; ++i) to[i] = static_cast<std::uint16_t>(bits[i]);
  return bad;
}

template <Kind kKind, typename T>
PJAX_INLINE std::int64_t Copy(const unsigned char* from, T* to, std::int64_t count) {
  float numbers[kGroup];
  std::int64_t bad = 0;
  for (; count >= kGroup; count -= kGroup, from += Source<kKind>::kBytes, to += kGroup) {
    Source<kKind>::Get(from, numbers);
    bad += Put<kKind == kBfloat16>(numbers, to);
  }
  if constexpr (kKind == kFloat32 || kKind == kFloat16 || kKind == kBfloat16) {
    if (count > 0) {
      unsigned char last[Source<kKind>::kBytes] = {};
      T numbers_of_last[kGroup];
      std::memcpy(last, from, count * (Source<kKind>::kBytes / kGroup));
      Source<kKind>::Get(last, numbers);
      bad += Put<kKind == kBfloat16>(numbers, numbers_of_last);
      std::memcpy(to, numbers_of_last, count * sizeof(T));
    }
  }
  return bad;
}

template <typename T>
PJAX_INLINE std::int64_t CopyKind(std::int32_t kind, const unsigned char* from, T* to, std::int64_t count) {
  switch (kind) {
    case kFloat32: return Copy<kFloat32>(from, to, count);
    case kFloat16: return Copy<kFloat16>(from, to, count);
    case kBfloat16: return Copy<kBfloat16>(from, to, count);
    case kQ8_0: return Copy<kQ8_0>(from, to, count);
    case kQ4_0: return Copy<kQ4_0>(from, to, count);
    case kQ4_1: return Copy<kQ4_1>(from, to, count);
    default: return -1;
  }
}

#define PJAX_DEFINE(NAME, ATTRIBUTES, W, N)                                                                                        \
  ATTRIBUTES std::int64_t Copy##NAME(std::int32_t kind, const unsigned char* from, bool is_wide, void* to, std::int64_t count) {  \
    return is_wide ? CopyKind(kind, from, static_cast<float*>(to), count) : CopyKind(kind, from, static_cast<std::uint16_t*>(to), count); \
  }
PJAX_FOR_EACH_WIDTH(PJAX_DEFINE)
#undef PJAX_DEFINE

}  // namespace

// to[i] = from[i] for `count` numbers of a `Kind`, whole blocks of quantised ones, as float32 or (`is_wide` 0) bfloat16. Returns how
// many are NaN or infinite then, or -1 for another kind.
extern "C" std::int64_t PjaxCopyWeights(std::int32_t kind, const void* from, std::int32_t is_wide, void* to, std::int64_t count) {
  const auto* bytes = static_cast<const unsigned char*>(from);
#if defined(__x86_64__)
  const Width width = WidestVectors();
  if (width == Width::Avx512) return CopyAvx512(kind, bytes, is_wide != 0, to, count);
  if (width == Width::Avx2) return CopyAvx2(kind, bytes, is_wide != 0, to, count);
#endif
  return CopyPlain(kind, bytes, is_wide != 0, to, count);
}
