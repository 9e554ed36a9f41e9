// y = x · Wᵀ for CPUs, called by XLA through its foreign-function interface: W [out, in] as checkpoints have it, float32 or bfloat16,
// sums in float32.
//
// XLA's product library repacks one side of each product. With few rows that costs as much as the product: here weights are read
// where they lie, once. Few rows of x: four rows of W against three of x, sums along `in` staying in registers until the end. Many:
// x is packed so that a vector is one number of W rows of it, four rows of W against three such vectors, or eight against one, no sums
// across lanes. The weights of all layers are operands, of which `index` picks one: a loop over layers needs no conditional, and copies
// nothing. `count` is how many rows of x hold anything: a step's shape is the next larger one that was compiled.

#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "lanes.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace {

using namespace pjax;

constexpr int kOuts = 4;                  // rows of W in a tile
constexpr int kVectors = 3;               // of packed x in a tile
constexpr int64_t kDepth = 1536;          // of `in` that one pass takes
constexpr int64_t kPanel = 192 << 10;     // bytes of W, as float32, that stay in the second cache
constexpr int64_t kGrain = 96 << 10;      // bytes of W that a thread takes at a time, at least
constexpr int64_t kPackGrain = 48 << 10;  // bytes of x that a thread packs at a time

// Rows of W in a panel.
inline int64_t PanelRows(int64_t depth) { return std::max<int64_t>(kPanel / (4 * depth) / kOuts, 1) * kOuts; }

PJAX_INLINE void Put(Four total, bool add, float* to) {
  if (add) {
    Four before;
    std::memcpy(&before, to, sizeof before);
    total += before;
  }
  std::memcpy(to, &total, sizeof total);
}

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
    Put(total, add, y + n * y_stride);
  }
}

// The same for one row of x, one row of W after the other as they lie in memory, which the processor's own prefetcher follows best.
// With one part, sums are added in the order of Tile's.
template <int W, int kParts>
PJAX_INLINE void OneRow(const float* w, int64_t w_stride, const float* x, int64_t depth, bool add, float* y) {
  using F = typename Lanes<W>::F;
  F sum[kOuts];
  int64_t i = 0;
  for (int m = 0; m < kOuts; ++m) {
    const float* row = w + m * w_stride;
    F part[4] = {};
    for (i = 0; i + 4 * W <= depth; i += 4 * W)
      PJAX_UNROLL for (int k = 0; k < 4; ++k) part[k % kParts] = Held(part[k % kParts] + Load<W>(row + i + k * W) * Load<W>(x + i + k * W));
    for (; i + W <= depth; i += W) part[0] = Held(part[0] + Load<W>(row + i) * Load<W>(x + i));  // in this order
    sum[m] = kParts == 1 ? part[0] : (part[0] + part[1]) + (part[2] + part[3]);
  }
  Four total = SumEach<W>(sum[0], sum[1], sum[2], sum[3]);
  for (; i < depth; ++i)
    for (int m = 0; m < kOuts; ++m) total[m] += w[m * w_stride + i] * x[i];
  Put(total, add, y);
}

// The same for any number of rows of x. The first of them meet a tile of W that is in no cache (kIsFar): a float32 tile comes with the
// first row alone, a bfloat16 tile, whose conversions are too many for that, has the next one fetched.
template <int W, int N, bool kIsFar, typename T>
PJAX_INLINE void Columns(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t rows, int64_t depth, bool add, float* y,
                         int64_t y_stride) {
  int64_t n = 0;
  if constexpr (kIsFar && sizeof(T) == 4) {
    if (rows == 1) return OneRow<W, 4>(w, w_stride, x, depth, add, y);
    OneRow<W, 1>(w, w_stride, x, depth, add, y);
    n = 1;
  }
  auto tile = [&](auto count) __attribute__((always_inline)) {
    Tile<W, count(), kIsFar && sizeof(T) == 2>(w, w_stride, x + n * x_stride, x_stride, depth, add, y + n * y_stride, y_stride);
    n += count();
  };
  while (rows - n >= N) tile(std::integral_constant<int, N>());
  if constexpr (N > 3)
    if (rows - n >= 3) tile(std::integral_constant<int, 3>());
  if (rows - n == 2) tile(std::integral_constant<int, 2>());
  if (rows - n == 1) tile(std::integral_constant<int, 1>());
}

struct Problem {
  const void* w;   // [outs, depth]
  const float* x;  // [rows, depth]; packed, [rows / W, depth, W] with zeros in rows that are none
  float* y;        // [rows, outs]
  int64_t rows, outs, depth;
  int64_t all_rows;  // of y; those from `rows` on become zeros
  bool is_packed;
};

// W rows of x [rows, depth], of which there are `rows`, side by side: to[depth][W].
template <int W, typename X>
PJAX_INLINE void Pack(const X* x, int64_t rows, int64_t depth, float* to) {
  using F = typename Lanes<W>::F;
  int64_t i = 0;
  for (; i + W <= depth; i += W) {
    F some[W];
    for (int m = 0; m < W; ++m) some[m] = m < rows ? Load<W>(x + m * depth + i) : F{};
    Transpose<W>(some);
    std::memcpy(to + i * W, some, sizeof some);
  }
  for (; i < depth; ++i)
    for (int m = 0; m < W; ++m) to[i * W + m] = m < rows ? Load1(x + m * depth + i) : 0.0f;
}

// How the next tile of W is fetched: not at all, its lines as they lie, or, where its rows are parts of longer ones, a line of each in turn.
// (As they lie is best: rows side by side may share few of the first cache's sets.)
enum class Fetch { kNone, kInOrder, kAcross };

// y[n][m] (+)= Σ_i w[m][i] · x[n][i] for M rows of w and V vectors of packed x, of whose rows there are `rows`.
template <int W, int M, int V, Fetch kFetch>
PJAX_INLINE void PackedTile(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t rows, int64_t depth, bool add,
                            float* y, int64_t y_stride) {
  using F = typename Lanes<W>::F;
  constexpr int kLine = 16;  // numbers
  F sum[M][V] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; ++i) {
    if constexpr (kFetch != Fetch::kNone)
      if (i % (kLine / M) == 0)
        __builtin_prefetch(w + M * w_stride +
                           (kFetch == Fetch::kInOrder ? i * M : i / (kLine / M) % M * w_stride + i / kLine * kLine));
    F factors[V];
    PJAX_UNROLL for (int v = 0; v < V; ++v) factors[v] = Held(Load<W>(x + v * x_stride + i * W));
    PJAX_UNROLL for (int m = 0; m < M; ++m) {
      const F weight = Held(Spread<W>(w[m * w_stride + i]));
      PJAX_UNROLL for (int v = 0; v < V; ++v) sum[m][v] += weight * factors[v];
    }
  }
  PJAX_UNROLL for (int v = 0; v < V; ++v) {
    PJAX_UNROLL for (int m = 0; m < M; m += kOuts) {
      Four fours[W];  // of each row
      FoursOf<W>(sum[m][v], sum[m + 1][v], sum[m + 2][v], sum[m + 3][v], fours);
      for (int n = 0; n < std::min<int64_t>(W, rows - v * W); ++n) Put(fours[n], add, y + (v * W + n) * y_stride + m);
    }
  }
}

// y for rows [first, last) of W, few rows of x. Bfloat16 weights become float32 in `scratch` where several rows of x use them.
template <int W, int N, typename T>
PJAX_INLINE void FewRows(const Problem& p, int64_t first, int64_t last, float* scratch) {
  const T* w = static_cast<const T*>(p.w);
  const bool widen = sizeof(T) == 2 && p.rows > 3;
  for (int64_t i = 0; i < p.depth; i += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - i);
    for (int64_t m = first; m + kOuts <= last; m += kOuts) {
      const T* source = w + m * p.depth + i;
      float* y = p.y + m;
      if (widen) {
        Widen<W>(source, p.depth, kOuts, depth, scratch, kDepth);
        Columns<W, N, false>(scratch, kDepth, p.x + i, p.depth, p.rows, depth, i > 0, y, p.outs);
      } else {
        Columns<W, N, true>(source, p.depth, p.x + i, p.depth, p.rows, depth, i > 0, y, p.outs);
      }
    }
  }
}

// The same for many rows of x, packed: those of a tile pass by a panel of W that stays in the second cache.
template <int W, typename T>
PJAX_INLINE void ManyRows(const Problem& p, int64_t first, int64_t last, float* scratch) {
  const int64_t vectors = (p.rows + W - 1) / W, turns = (vectors + kVectors - 1) / kVectors;  // of two or three vectors each
  for (int64_t i = 0; i < p.depth; i += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - i), panel = PanelRows(depth);
    for (int64_t o = first; o + kOuts <= last; o += panel) {
      const int64_t end = o + std::min(panel, last - o) / kOuts * kOuts;
      const T* source = static_cast<const T*>(p.w) + o * p.depth + i;
      const float* w;
      int64_t stride = p.depth;
      if constexpr (sizeof(T) == 2)
        Widen<W>(source, p.depth, end - o, depth, scratch, stride = depth), w = scratch;
      else
        w = source;
      for (int64_t turn = 0, v = 0; turn < turns; ++turn) {
        const int64_t count = (vectors - v + turns - turn - 1) / (turns - turn);  // as even as can be
        auto tiles = [&](auto number, auto fetch) __attribute__((always_inline)) {
          auto tile = [&](auto outs, int64_t m) __attribute__((always_inline)) {
            PackedTile<W, outs(), number(), fetch()>(w + m * stride, stride, p.x + (v * p.depth + i) * W, p.depth * W, p.rows - v * W, depth,
                                                     i > 0, p.y + v * W * p.outs + o + m, p.outs);
          };
          int64_t m = 0;
          if constexpr (number() == 1)
            for (; m + 2 * kOuts <= end - o; m += 2 * kOuts) tile(std::integral_constant<int, 2 * kOuts>(), m);
          for (; m < end - o; m += kOuts) tile(std::integral_constant<int, kOuts>(), m);
        };
        auto some = [&](auto number) __attribute__((always_inline)) {
          if constexpr (sizeof(T) == 4)  // widened weights are near
            if (turn == 0)
              return stride == depth ? tiles(number, std::integral_constant<Fetch, Fetch::kInOrder>())
                                     : tiles(number, std::integral_constant<Fetch, Fetch::kAcross>());
          tiles(number, std::integral_constant<Fetch, Fetch::kNone>());
        };
        if (count == 3) some(std::integral_constant<int, 3>());
        if (count == 2) some(std::integral_constant<int, 2>());
        if (count == 1) some(std::integral_constant<int, 1>());
        v += count;
      }
    }
  }
}

// Rows of W that make no tile.
template <int W, typename T>
PJAX_INLINE void LastRows(const Problem& p, int64_t first, int64_t last) {
  const T* w = static_cast<const T*>(p.w);
  for (int64_t m = first + (last - first) / kOuts * kOuts; m < last; ++m)
    for (int64_t n = 0; n < p.rows; ++n) {
      const float* x = p.is_packed ? p.x + n / W * W * p.depth + n % W : p.x + n * p.depth;
      const int64_t step = p.is_packed ? W : 1;
      float sum = 0;
      for (int64_t i = 0; i < p.depth; ++i) sum += Load1(w + m * p.depth + i) * x[i * step];
      p.y[n * p.outs + m] = sum;
    }
}

template <int W, int N, typename T>
PJAX_INLINE void Rows(const Problem& p, int64_t first, int64_t last, float* scratch) {
  if (p.rows > 0) {
    p.is_packed ? ManyRows<W, T>(p, first, last, scratch) : FewRows<W, N, T>(p, first, last, scratch);
    LastRows<W, T>(p, first, last);
  }
  for (int64_t n = p.rows; n < p.all_rows; ++n) std::fill(p.y + n * p.outs + first, p.y + n * p.outs + last, 0.0f);
}

// What vectors of one width have; of two functions the second takes float32, the first bfloat16.
struct Kernels {
  int64_t width;  // of a vector
  void (*rows[2])(const Problem&, int64_t first, int64_t last, float* scratch);
  void (*pack[2])(const void* x, int64_t rows, int64_t depth, float* to);
};

#define PJAX_KERNELS(name, attributes, W, N)                                                  \
  template <typename T>                                                                       \
  attributes void name##Rows(const Problem& p, int64_t first, int64_t last, float* scratch) { \
    Rows<W, N, T>(p, first, last, scratch);                                                   \
  }                                                                                           \
  template <typename X>                                                                       \
  attributes void name##Pack(const void* x, int64_t rows, int64_t depth, float* to) {         \
    Pack<W>(static_cast<const X*>(x), rows, depth, to);                                       \
  }
PJAX_FOR_EACH_WIDTH(PJAX_KERNELS)

Kernels Best() {
  const Width width = WidestVectors();
#define PJAX_CHOOSE(name, attributes, W, N) \
  if (width == Width::name) return {W, {name##Rows<uint16_t>, name##Rows<float>}, {name##Pack<uint16_t>, name##Pack<float>}};
  PJAX_FOR_EACH_WIDTH(PJAX_CHOOSE)
  return {};
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
  return std::max(least, std::min(fair, PanelRows(std::min(kDepth, p.depth))));
}

// Whether rows of x are packed: many are, and float32 weights meet all of a vector's rows at once where they fill more than half of it.
// (Bfloat16 weights are widened first, for which four rows at a time are better.)
bool IsPacked(int64_t rows, int64_t width, bool weights_are_wide) {
  return 2 * rows > 3 * width || (weights_are_wide && 2 * rows > width && rows <= width);
}

// x as products take it: packed where there are many rows, else as float32. Null where it is that already.
std::unique_ptr<Floats> Prepare(ffi::ThreadPool& pool, const Kernels& kernels, const void* x, bool is_wide, Problem* p) {
  const int64_t width = kernels.width, rows = p->rows, depth = p->depth, vectors = (rows + width - 1) / width;
  p->x = static_cast<const float*>(x);
  if (is_wide && !p->is_packed) return nullptr;
  auto made = std::make_unique<Floats>((p->is_packed ? vectors * width : rows) * depth);
  float* to = made->data;
  p->x = to;
  if (p->is_packed) {
    const int64_t size = width * depth * (is_wide ? 4 : 2), some = std::max<int64_t>(kPackGrain / size, 1);
    pjax::Share(pool, (vectors + some - 1) / some, [=, pack = kernels.pack[is_wide]] {
      return [=](int64_t item) {
        for (int64_t v = item * some; v < std::min(vectors, (item + 1) * some); ++v)
          pack(static_cast<const char*>(x) + v * size, std::min(width, rows - v * width), depth, to + v * width * depth);
      };
    });
  } else {
    for (int64_t i = 0; i < rows * depth; ++i) to[i] = Load1(static_cast<const uint16_t*>(x) + i);
  }
  return made;
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::S32> count,
                   ffi::RemainingArgs weights, ffi::ResultBuffer<ffi::F32> y) {
  const auto which = std::clamp<int64_t>(index.typed_data()[0], 0, static_cast<int64_t>(weights.size()) - 1);
  const auto chosen = weights.get<ffi::AnyBuffer>(which);
  if (!chosen.has_value()) return chosen.error();
  const ffi::AnyBuffer w = *chosen;
  const bool is_wide = w.element_type() == ffi::F32, x_is_wide = x.element_type() == ffi::F32;
  if ((!is_wide && w.element_type() != ffi::BF16) || (!x_is_wide && x.element_type() != ffi::BF16))
    return ffi::Error::InvalidArgument("a product takes float32 and bfloat16");
  const Kernels kernels = Best();
  const int64_t all_rows = x.dimensions()[0], rows = std::clamp<int64_t>(count.typed_data()[0], 0, all_rows);
  Problem p{w.untyped_data(),  nullptr,           y->typed_data(), rows,
            w.dimensions()[0], x.dimensions()[1], all_rows,        IsPacked(rows, kernels.width, is_wide)};
  const auto prepared = Prepare(pool, kernels, x.untyped_data(), x_is_wide, &p);
  const int64_t grain = Grain(p, is_wide ? 4 : 2, std::max<int64_t>(pool.num_threads(), 1));
  pjax::Share(pool, (p.outs + grain - 1) / grain, [p, grain, run = kernels.rows[is_wide]] {
    auto scratch = std::make_shared<Floats>(kPanel / 4 + kOuts * kDepth);
    return [p, grain, run, scratch](int64_t item) { run(p, item * grain, std::min(p.outs, (item + 1) * grain), scratch->data); };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PjaxProduct, Product,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .RemainingArgs()
        .Ret<ffi::Buffer<ffi::F32>>());
