// Vectors of W float32 lanes, in the compiler's own notation, and which W this machine takes.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define PJAX_INLINE inline __attribute__((always_inline))
#define PJAX_UNROLL _Pragma("GCC unroll 8")

namespace pjax {

template <int W>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

template <int W>
PJAX_INLINE typename Lanes<W>::F Load(const float* p) {
  typename Lanes<W>::F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int W>
PJAX_INLINE typename Lanes<W>::F Load(const uint16_t* p) {
  typename Lanes<W>::H v;
  std::memcpy(&v, p, sizeof v);
  return (typename Lanes<W>::F)(__builtin_convertvector(v, typename Lanes<W>::U) << 16);
}

PJAX_INLINE float Load1(const float* p) { return *p; }
PJAX_INLINE float Load1(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A value that GCC holds in a register, and would otherwise load anew for each use.
template <typename V>
PJAX_INLINE V Held(V v) {
#if defined(__clang__)  // refuses registers wider than those of the whole file's level
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// The sums of four vectors, side by side.
template <int W, int kStep, int kOffset, typename F, int64_t... I>
PJAX_INLINE F Interleave(F a, F b, std::integer_sequence<int64_t, I...>) {
  // Of each 2·kStep lanes, kStep of a and kStep of b, from kOffset on.
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, static_cast<int>((I & kStep ? W : 0) + (I & ~(2 * kStep - 1)) + (I & (kStep - 1)) + kOffset)...);
#else
  const typename Lanes<W>::I places = {static_cast<int>((I & kStep ? W : 0) + (I & ~(2 * kStep - 1)) + (I & (kStep - 1)) + kOffset)...};
  return __builtin_shuffle(a, b, places);
#endif
}

typedef float Four __attribute__((vector_size(16)));

template <int W>
PJAX_INLINE Four Fold(typename Lanes<W>::F v) {
  if constexpr (W == 4) {
    return v;
  } else {
    typename Lanes<W / 2>::F halves[2];
    std::memcpy(halves, &v, sizeof v);
    return Fold<W / 2>(halves[0] + halves[1]);
  }
}

template <int W, typename F = typename Lanes<W>::F>
PJAX_INLINE Four SumEach(F a, F b, F c, F d) {
  constexpr std::make_integer_sequence<int64_t, W> lanes;
  F ab = Interleave<W, 1, 0>(a, b, lanes) + Interleave<W, 1, 1>(a, b, lanes);
  F cd = Interleave<W, 1, 0>(c, d, lanes) + Interleave<W, 1, 1>(c, d, lanes);
  return Fold<W>(Interleave<W, 2, 0>(ab, cd, lanes) + Interleave<W, 2, 2>(ab, cd, lanes));
}

// Numbers of four vectors, those of a lane together.
template <int W, typename F = typename Lanes<W>::F>
PJAX_INLINE void FoursOf(F a, F b, F c, F d, Four* to) {
  constexpr std::make_integer_sequence<int64_t, W> lanes;
  const F ab = Interleave<W, 1, 0>(a, b, lanes), ab1 = Interleave<W, 1, 1>(a, b, lanes);
  const F cd = Interleave<W, 1, 0>(c, d, lanes), cd1 = Interleave<W, 1, 1>(c, d, lanes);
  const F lane[4] = {Interleave<W, 2, 0>(ab, cd, lanes), Interleave<W, 2, 0>(ab1, cd1, lanes), Interleave<W, 2, 2>(ab, cd, lanes),
                     Interleave<W, 2, 2>(ab1, cd1, lanes)};
  PJAX_UNROLL for (int j = 0; j < 4; ++j)
    PJAX_UNROLL for (int i = 0; i < W; i += 4) std::memcpy(to + i + j, reinterpret_cast<const char*>(&lane[j]) + 4 * i, sizeof(Four));
}

// Lane m of vector n becomes lane n of vector m, of W vectors.
template <int W, int kStep = 1, typename F = typename Lanes<W>::F>
PJAX_INLINE void Transpose(F* some) {
  if constexpr (kStep < W) {
    constexpr std::make_integer_sequence<int64_t, W> lanes;
    for (int m = 0; m < W; ++m)
      if (!(m & kStep)) {
        const F a = some[m], b = some[m + kStep];
        some[m] = Interleave<W, kStep, 0>(a, b, lanes);
        some[m + kStep] = Interleave<W, kStep, kStep>(a, b, lanes);
      }
    Transpose<W, 2 * kStep>(some);
  }
}

template <int W>
PJAX_INLINE typename Lanes<W>::F Spread(float x) {
  typename Lanes<W>::F v;
  for (int i = 0; i < W; ++i) v[i] = x;
  return v;
}

// to[m][i] = w[m][i] for `count` rows of `depth`, as float32.
template <int W, typename T>
PJAX_INLINE void Widen(const T* w, int64_t w_stride, int64_t count, int64_t depth, float* to, int64_t stride) {
  for (int64_t m = 0; m < count; ++m) {
    int64_t i = 0;
    for (; i + W <= depth; i += W) {
      const auto wide = Load<W>(w + m * w_stride + i);
      std::memcpy(to + m * stride + i, &wide, sizeof wide);
    }
    for (; i < depth; ++i) to[m * stride + i] = Load1(w + m * w_stride + i);
  }
}

// A function for each width of vectors in one library, each with all that it calls inlined: PJAX_FOR_EACH_WIDTH(DEFINE) is
// DEFINE(name, attributes, W, N), N being the rows that share a load of four others, as many as the registers hold sums for.
#if defined(__x86_64__)
#if defined(__clang__)  // ignores all of an attribute whose parts it does not know
#define PJAX_AVX512 "arch=x86-64-v4"
#else
#define PJAX_AVX512 "arch=x86-64-v4,prefer-vector-width=512"
#endif
#define PJAX_FOR_EACH_WIDTH(DEFINE)                                               \
  DEFINE(Avx512, __attribute__((target(PJAX_AVX512), flatten)), 16, 6)             \
  DEFINE(Avx2, __attribute__((target("arch=x86-64-v3"), flatten)), 8, 3)           \
  DEFINE(Plain, __attribute__((flatten)), 4, 3)
enum class Width { Plain, Avx2, Avx512 };
#else
#define PJAX_FOR_EACH_WIDTH(DEFINE) DEFINE(Plain, __attribute__((flatten)), 4, 6)
enum class Width { Plain };
#endif

// The widest vectors of the level in use (cpu_level.cc).
Width WidestVectors();

}  // namespace pjax
