// y = x · Wᵀ for CPUs, called by XLA through its foreign-function interface: W [out, in] as checkpoints have it, float32 or bfloat16,
// sums in float32.
//
// XLA's product library repacks one side of each product. With few rows that costs as much as the product: here weights are read
// once, where they lie, four rows of them against a few rows of x, sums along `in` staying in registers until the end. The weights
// of all layers are operands, of which `index` picks one: a loop over layers needs no conditional, and copies nothing.

#include <cstring>
#include <new>
#include <type_traits>

#include "lanes.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace {

using namespace pjax;

constexpr int kOuts = 4;                       // rows of W in a tile
constexpr int64_t kDepth = 1536;               // of `in` that one pass takes
constexpr int64_t kNear = 80 << 10;            // bytes of x that stay in the second cache
constexpr int64_t kPanel = 192 << 10;          // bytes of W, as float32, that stay there too
constexpr int64_t kGrain = 96 << 10;           // bytes of W that a thread takes at a time, at least

// y[n][m] (+)= Σ_i w[m][i] · x[n][i] for kOuts rows of w and N rows of x.
template <int W, int N, bool kFetch, typename T>
PJAX_INLINE void Tile(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth, bool add, float* y, int64_t y_stride) {
  using F = typename Lanes<W>::F;
  F sum[kOuts][N] = {};
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + W <= depth; i += W) {
    if constexpr (kFetch)  // the next tile, which is not in any cache yet
      for (int64_t line = 0; line < kOuts * W * int64_t{sizeof(T)}; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w + kOuts * (w_stride + i)) + line);
    F factors[N];
    PJAX_UNROLL for (int n = 0; n < N; ++n) factors[n] = Held(Load<W>(x + n * x_stride + i));
    PJAX_UNROLL for (int m = 0; m < kOuts; ++m) {
      const F weights = Held(Load<W>(w + m * w_stride + i));
      PJAX_UNROLL for (int n = 0; n < N; ++n) sum[m][n] += weights * factors[n];
    }
  }
  PJAX_UNROLL for (int n = 0; n < N; ++n) {
    Four total = SumEach<W>(sum[0][n], sum[1][n], sum[2][n], sum[3][n]);
    for (int64_t j = i; j < depth; ++j)
      for (int m = 0; m < kOuts; ++m) total[m] += Load1(w + m * w_stride + j) * x[n * x_stride + j];
    float* to = y + n * y_stride;
    if (add) {
      Four before;
      std::memcpy(&before, to, sizeof before);
      total += before;
    }
    std::memcpy(to, &total, sizeof total);
  }
}

// The same for any number of rows of x.
template <int W, int N, typename T>
PJAX_INLINE void Columns(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t rows, int64_t depth, bool add, float* y,
                         int64_t y_stride) {
  int64_t n = 0;
  auto tile = [&](auto count, auto fetch) __attribute__((always_inline)) {
    Tile<W, count(), fetch()>(w, w_stride, x + n * x_stride, x_stride, depth, add, y + n * y_stride, y_stride);
    n += count();
  };
  constexpr std::true_type kFirst;
  constexpr std::false_type kLater;
  if (rows >= N) tile(std::integral_constant<int, N>(), kFirst);
  while (rows - n >= N) tile(std::integral_constant<int, N>(), kLater);
  if constexpr (N > 3)
    if (rows - n >= 3) tile(std::integral_constant<int, 3>(), kLater);
  if (rows - n == 2) tile(std::integral_constant<int, 2>(), kFirst);
  if (rows - n == 1) tile(std::integral_constant<int, 1>(), kFirst);
}

struct Problem {
  const void* w;   // [outs, depth]
  const float* x;  // [rows, depth]
  float* y;        // [rows, outs]
  int64_t rows, outs, depth;
};

// y for rows [first, last) of W. Passes over `in` in pieces that leave x in the first cache; bfloat16 weights become float32 in
// `scratch` where many rows of x use them.
template <int W, int N, typename T>
PJAX_INLINE void Panel(const Problem& p, int64_t first, int64_t last, float* scratch) {
  const T* w = static_cast<const T*>(p.w);
  const bool widen = sizeof(T) == 2 && p.rows > 3;
  const int64_t passes = (p.depth + kDepth - 1) / kDepth, piece = ((p.depth + passes - 1) / passes + 15) / 16 * 16;
  for (int64_t i = 0; i < p.depth; i += piece) {
    const int64_t depth = std::min(piece, p.depth - i);
    const int64_t stride = (depth + 15) / 16 * 16;  // of a row of `scratch`
    const int64_t near = std::max<int64_t>(kNear / (4 * depth) / N, 1) * N;
    // Where all rows of x are near, each tile of W is used up at once; else a panel of W stays in the second cache.
    const int64_t panel = p.rows <= near ? kOuts : std::max<int64_t>(kPanel / (4 * stride) / kOuts, 1) * kOuts;
    for (int64_t o = first; o < last; o += panel) {
      const int64_t end = std::min(o + panel, last);
      const T* source = w + o * p.depth + i;
      if (widen)
        for (int64_t m = 0; m < end - o; ++m) {
          int64_t j = 0;
          for (; j + W <= depth; j += W) {
            auto wide = Load<W>(source + m * p.depth + j);
            std::memcpy(scratch + m * stride + j, &wide, sizeof wide);
          }
          for (; j < depth; ++j) scratch[m * stride + j] = Load1(source + m * p.depth + j);
        }
      for (int64_t n = 0; n < p.rows; n += near) {
        const int64_t rows = std::min(near, p.rows - n);
        const float* x = p.x + n * p.depth + i;
        int64_t m = 0;
        for (; m + kOuts <= end - o; m += kOuts) {
          float* y = p.y + n * p.outs + o + m;
          if (widen)
            Columns<W, N>(scratch + m * stride, stride, x, p.depth, rows, depth, i > 0, y, p.outs);
          else
            Columns<W, N>(source + m * p.depth, p.depth, x, p.depth, rows, depth, i > 0, y, p.outs);
        }
        for (; m < end - o; ++m)  // rows of W that make no tile
          for (int64_t r = 0; r < rows; ++r) {
            float sum = 0, *y = p.y + (n + r) * p.outs + o + m;
            for (int64_t j = 0; j < depth; ++j) sum += Load1(source + m * p.depth + j) * x[r * p.depth + j];
            *y = i > 0 ? *y + sum : sum;
          }
      }
    }
  }
}

using Run = void (*)(const Problem&, int64_t first, int64_t last, float* scratch);

#define PJAX_PANEL(name, attributes, W, N)                                                              \
  template <typename T>                                                                                 \
  attributes void name##Panel(const Problem& p, int64_t first, int64_t last, float* scratch) {          \
    Panel<W, N, T>(p, first, last, scratch);                                                            \
  }
PJAX_FOR_EACH_LEVEL(PJAX_PANEL)

template <typename T>
Run Best() {
#define PJAX_CHOOSE(name, attributes, W, N) \
  if (BestLevel() == Level::name) return name##Panel<T>;
  PJAX_FOR_EACH_LEVEL(PJAX_CHOOSE)
  return nullptr;
}

struct Floats {
  explicit Floats(int64_t size) : data(static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(64)))) {}
  ~Floats() { ::operator delete(data, std::align_val_t(64)); }
  Floats(const Floats&) = delete;
  float* const data;
};

// Rows of W that a thread takes at a time: enough to stream, few enough that threads end together.
int64_t Grain(const Problem& p, int64_t item_size, int64_t num_threads) {
  const int64_t least = std::max<int64_t>(kGrain / (p.depth * item_size) / kOuts, 1) * kOuts;
  const int64_t fair = (p.outs / (4 * num_threads) + kOuts - 1) / kOuts * kOuts;
  return std::max(least, std::min<int64_t>(fair, std::max<int64_t>(kPanel / (4 * std::min(kDepth, p.depth)) / kOuts, 1) * kOuts));
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> index, ffi::RemainingArgs weights,
                   ffi::ResultBuffer<ffi::F32> y) {
  const auto which = std::clamp<int64_t>(index.typed_data()[0], 0, static_cast<int64_t>(weights.size()) - 1);
  const auto chosen = weights.get<ffi::AnyBuffer>(which);
  if (!chosen.has_value()) return chosen.error();
  const ffi::AnyBuffer w = *chosen;
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], outs = w.dimensions()[0];
  const bool is_wide = w.element_type() == ffi::F32, x_is_wide = x.element_type() == ffi::F32;
  if ((!is_wide && w.element_type() != ffi::BF16) || (!x_is_wide && x.element_type() != ffi::BF16))
    return ffi::Error::InvalidArgument("a product takes float32 and bfloat16");
  const Floats widened(x_is_wide ? 0 : rows * depth);
  if (!x_is_wide)
    for (int64_t i = 0; i < rows * depth; ++i) widened.data[i] = Load1(static_cast<const uint16_t*>(x.untyped_data()) + i);
  const Problem p{w.untyped_data(), x_is_wide ? static_cast<const float*>(x.untyped_data()) : widened.data, y->typed_data(), rows, outs, depth};
  const int64_t grain = Grain(p, is_wide ? 4 : 2, std::max<int64_t>(pool.num_threads(), 1));
  static const Run f32 = Best<float>(), bf16 = Best<uint16_t>();
  const Run run = is_wide ? f32 : bf16;
  pjax::Share(pool, (outs + grain - 1) / grain, [p, grain, run] {
    auto scratch = std::make_shared<Floats>(kPanel / 4 + kOuts * kDepth);
    return [p, grain, run, scratch](int64_t item) { run(p, item * grain, std::min(p.outs, (item + 1) * grain), scratch->data); };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PjaxProduct, Product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().Ret<ffi::Buffer<ffi::F32>>());

extern "C" int PjaxHasBfloat16Units() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") ? 1 : 0;
#else
  return 0;
#endif
}
