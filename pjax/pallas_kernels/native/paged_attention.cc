// Paged attention for CPUs, called by XLA through its foreign-function interface. Float32; pages of float32 or bfloat16.
//
// The definition is reference.py's. Plain XLA (xla.py) has to copy each block of pages twice before a product can use
// it; here keys and values are read where they lie. Flash accumulation (Dao et al. 2022, algorithm 1) over blocks of
// keys. Work is cut into items, decode rows and tiles of prefill queries, that XLA's own threads take in turn.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "lanes.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace {

using namespace pjax;

constexpr int kBlock = 64;      // keys that one flash step takes
constexpr int kQueryTile = 16;  // query tokens of a prefill item
constexpr int kKeys = 4;        // keys of a tile of products
constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Problem {
  const float* q;             // [T, N, H]
  const void* pages;          // [P, G, 2·K·H]
  const int32_t* row_starts;  // [S + 1]
  const int32_t* kv_lens;     // [S]
  const int32_t* tables;      // [S, W]
  float* out;                 // [T, N, H]
  int64_t num_pages, page_size, table_width, num_heads, num_kv_heads, head_size;
  float scale, softcap;       // softcap 0: none
  int64_t window;             // 0: none
};

// Query tokens [first, first + count) of one row, for KV heads [kv_head, kv_head + num_kv_heads).
struct Item {
  int32_t row, first, count, kv_head, num_kv_heads;
};

// e^x for x <= 0 within 2 units in the last place, in a form that compilers vectorise (Cody and Waite's reduction).
PJAX_INLINE float Exp(float x) {
  float bounded = x < -87.0f ? -87.0f : x;
  float n = std::floor(bounded * 1.44269504f + 0.5f);
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// Turns logits [kBlock] of which [low, high) are visible into weights, and keeps the running maximum and sum.
// Returns the factor by which what was accumulated before shrinks.
PJAX_INLINE float Soften(float* logits, int low, int high, float softcap, float* top, float* total) {
  if (softcap > 0)
    for (int j = low; j < high; ++j) logits[j] = softcap * std::tanh(logits[j] / softcap);
  for (int j = 0; j < kBlock; ++j) logits[j] = (j >= low) & (j < high) ? logits[j] : kMasked;
  float most = *top;
  for (int j = 0; j < kBlock; ++j) most = logits[j] > most ? logits[j] : most;
  if (most == kMasked) {
    for (int j = 0; j < kBlock; ++j) logits[j] = 0;
    return 1.0f;
  }
  float sum = 0;
  for (int j = 0; j < kBlock; ++j) {
    logits[j] = Exp(logits[j] - most);
    sum += logits[j];
  }
  float shrink = Exp(*top - most);
  *total = *total * shrink + sum;
  *top = most;
  return shrink;
}

// The rows of a block's keys and values in the pool, the first `count` of them; the rest repeat the last one.
template <typename T>
struct Slots {
  const T* row[kBlock];
  int count;
};

template <typename T>
PJAX_INLINE void Find(const Problem& p, const int32_t* table, int64_t first, int count, Slots<T>* slots) {
  const int64_t width = 2 * p.num_kv_heads * p.head_size;
  int64_t column = first / p.page_size, offset = first % p.page_size;
  for (int j = 0; j < count; ++column, offset = 0) {
    const int64_t page = std::clamp<int64_t>(table[column], 0, p.num_pages - 1);
    const T* row = static_cast<const T*>(p.pages) + (page * p.page_size + offset) * width;
    for (; j < count && offset < p.page_size; ++j, ++offset, row += width) slots->row[j] = row;
  }
  for (int j = count; j < kBlock; ++j) slots->row[j] = slots->row[count - 1];
  slots->count = count;
}

// logits[r][j] = q[r] · key j for R query rows and, at least, j in [low, high).
template <int W, int R, bool kFetch, typename T>
PJAX_INLINE void Score(const float* q, int64_t head_size, const Slots<T>& slots, const Slots<T>& next, int64_t offset, int low, int high,
                       float (*logits)[kBlock]) {
  using F = typename Lanes<W>::F;
  for (int j = low / kKeys * kKeys; j < high; j += kKeys) {
    F sum[kKeys][R] = {};
    for (int64_t h = 0; h < head_size; h += W) {
      F factors[R];
      PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(Load<W>(q + r * head_size + h));
      PJAX_UNROLL for (int k = 0; k < kKeys; ++k) {
        if constexpr (kFetch) __builtin_prefetch(next.row[j + k] + offset + h);
        const F key = Held(Load<W>(slots.row[j + k] + offset + h));
        PJAX_UNROLL for (int r = 0; r < R; ++r) sum[k][r] += key * factors[r];
      }
    }
    PJAX_UNROLL for (int r = 0; r < R; ++r) {
      const Four four = SumEach<W>(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
      std::memcpy(logits[r] + j, &four, sizeof four);
    }
  }
}

// acc[r] = acc[r] · shrink[r] + Σ_j weights[r][j] · value j for R query rows and V vectors of the head, from h on.
template <int W, int R, int V, bool kFetch, typename T>
PJAX_INLINE void AddSome(const float (*weights)[kBlock], const float* shrink, int64_t head_size, const Slots<T>& slots, const Slots<T>& next,
                         int64_t offset, int low, int high, int64_t h, float* acc) {
  using F = typename Lanes<W>::F;
  F sum[R][V];
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Load<W>(acc + r * head_size + h + v * W) * shrink[r];
  for (int j = low; j < high; ++j) {
    F factors[R];
    PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(F{} + weights[r][j]);
    PJAX_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kFetch) __builtin_prefetch(next.row[j] + offset + h + v * W);
      const F value = Held(Load<W>(slots.row[j] + offset + h + v * W));
      PJAX_UNROLL for (int r = 0; r < R; ++r) sum[r][v] += value * factors[r];
    }
  }
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) std::memcpy(acc + r * head_size + h + v * W, &sum[r][v], sizeof(F));
}

// The same for the whole head.
template <int W, int R, bool kFetch, typename T>
PJAX_INLINE void Add(const float (*weights)[kBlock], const float* shrink, int64_t head_size, const Slots<T>& slots, const Slots<T>& next,
                     int64_t offset, int low, int high, float* acc) {
  constexpr int kWide = R == 1 ? 8 : 4;  // enough sums to hide the latency of an addition, no more than there are registers for
  int64_t h = 0;
  auto add = [&](auto vectors) __attribute__((always_inline)) {
    for (; h + vectors() * W <= head_size; h += vectors() * W)
      AddSome<W, R, vectors(), kFetch>(weights, shrink, head_size, slots, next, offset, low, high, h, acc);
  };
  add(std::integral_constant<int, kWide>());
  if constexpr (kWide > 4) add(std::integral_constant<int, 4>());
  if constexpr (W > 4) add(std::integral_constant<int, 16 / W>());  // a head is a multiple of 16 numbers
}

// What an item accumulates, for the query rows of one of its KV heads: those of a token side by side.
struct Rows {
  float *q, *acc, *top, *total;  // [rows, H], [rows, H], [rows], [rows]
};

// One flash step of the query rows [m, m + R) and one KV head.
template <int W, int R, bool kFetch, typename T>
PJAX_INLINE void Step(const Problem& p, const Rows& rows, const Slots<T>& slots, const Slots<T>& next, int64_t kv_head, const int* low, const int* high, int m) {
  const int first = *std::min_element(low + m, low + m + R), last = *std::max_element(high + m, high + m + R);
  if (last == 0) return;
  alignas(64) float logits[R][kBlock];
  float shrink[R];
  const int64_t size = p.head_size, keys = kv_head * size, values = keys + p.num_kv_heads * size;
  Score<W, R, kFetch>(rows.q + m * size, size, slots, next, keys, first, last, logits);
  for (int r = 0; r < R; ++r)
    shrink[r] = Soften(logits[r], low[m + r], high[m + r], p.softcap, &rows.top[m + r], &rows.total[m + r]);
  Add<W, R, kFetch>(logits, shrink, size, slots, next, values, first, last, rows.acc + m * size);
}

// All of an item. Scratch holds its queries and accumulators.
template <int W, int N, bool kDecode, typename T>
PJAX_INLINE void Run(const Problem& p, const Item& item, std::vector<float>& scratch) {
  const int64_t ratio = p.num_heads / p.num_kv_heads, size = p.head_size;
  const int rows = static_cast<int>(item.count * ratio), all = rows * item.num_kv_heads;
  const int32_t* table = p.tables + item.row * p.table_width;
  const int64_t end = p.row_starts[item.row + 1], length = p.kv_lens[item.row];
  const int64_t position = length - (end - item.first);  // of the item's first query
  const int64_t last = position + item.count;            // keys [0, last) are visible to some query
  const int64_t begin = p.window > 0 ? std::max<int64_t>(position - p.window + 1, 0) / kBlock * kBlock : 0;

  scratch.assign(static_cast<size_t>(all) * (2 * size + 2), 0.0f);
  float *q = scratch.data(), *acc = q + all * size, *top = acc + all * size, *total = top + all;
  auto of_head = [&](int k) { return Rows{q + k * rows * size, acc + k * rows * size, top + k * rows, total + k * rows}; };
  auto place = [&](int k, int m) {  // of a query row in q and out
    return ((item.first + m / ratio) * p.num_heads + (item.kv_head + k) * ratio + m % ratio) * size;
  };
  for (int k = 0; k < item.num_kv_heads; ++k)
    for (int m = 0; m < rows; ++m) {
      const float* source = p.q + place(k, m);
      for (int64_t h = 0; h < size; ++h) q[(k * rows + m) * size + h] = source[h] * p.scale;
    }
  std::fill(top, top + all, kMasked);

  std::vector<int> bounds(2 * rows);  // the keys of a block that a query row sees: [low, high)
  int *low = bounds.data(), *high = low + rows;
  Slots<T> slots[2];
  auto find = [&](int64_t first) { Find(p, table, first, static_cast<int>(std::min<int64_t>(kBlock, last - first)), &slots[first / kBlock % 2]); };
  find(begin);
  for (int64_t first = begin; first < last; first += kBlock) {
    const Slots<T>& now = slots[first / kBlock % 2];
    const bool is_last = first + kBlock >= last;
    if (!is_last) find(first + kBlock);
    const Slots<T>& next = slots[is_last ? first / kBlock % 2 : (first / kBlock + 1) % 2];
    for (int m = 0; m < rows; ++m) {
      const int64_t seen = position + m / ratio + 1 - first;
      high[m] = static_cast<int>(std::clamp<int64_t>(seen, 0, now.count));
      low[m] = p.window > 0 ? static_cast<int>(std::clamp<int64_t>(seen - p.window, 0, high[m])) : 0;
    }
    for (int k = 0; k < item.num_kv_heads; ++k) {
      int m = 0;
      auto step = [&](auto count) __attribute__((always_inline)) {
        for (; m + count() <= rows; m += count()) Step<W, count(), kDecode>(p, of_head(k), now, next, item.kv_head + k, low, high, m);
      };
      step(std::integral_constant<int, N>());
      if constexpr (N > 3) step(std::integral_constant<int, 3>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 1>());
    }
  }

  for (int k = 0; k < item.num_kv_heads; ++k)
    for (int m = 0; m < rows; ++m) {
      float* target = p.out + place(k, m);
      const float sum = total[k * rows + m], factor = sum > 0 ? 1.0f / sum : 0.0f;
      for (int64_t h = 0; h < size; ++h) target[h] = acc[(k * rows + m) * size + h] * factor;
    }
}

using Work = void (*)(const Problem&, const Item&, std::vector<float>&);

#define PJAX_WORK(name, attributes, W, N)                                                       \
  template <typename T>                                                                         \
  attributes void name##Work(const Problem& p, const Item& item, std::vector<float>& scratch) { \
    item.count == 1 ? Run<W, N, true, T>(p, item, scratch) : Run<W, N, false, T>(p, item, scratch);                                                           \
  }
PJAX_FOR_EACH_LEVEL(PJAX_WORK)

template <typename T>
Work Best() {
#define PJAX_CHOOSE(name, attributes, W, N) \
  if (BestLevel() == Level::name) return name##Work<T>;
  PJAX_FOR_EACH_LEVEL(PJAX_CHOOSE)
  return nullptr;
}

struct Plan {
  Problem problem;
  std::vector<Item> items;
};

// Decode rows are items whole, since a token's heads lie side by side; by KV head where threads would have none.
std::vector<Item> MakeItems(const Problem& p, int64_t num_rows, int64_t num_tokens, int64_t num_threads) {
  std::vector<Item> items;
  const int32_t heads = static_cast<int32_t>(p.num_kv_heads), together = num_tokens < 2 * num_threads ? 1 : heads;
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t start = p.row_starts[row], end = std::min<int32_t>(p.row_starts[row + 1], num_tokens);
    for (int32_t k = 0; end - start == 1 && k < heads; k += together) items.push_back({row, start, 1, k, together});
    if (end - start < 2) continue;
    for (int32_t first = start; first < end; first += kQueryTile)
      for (int32_t k = 0; k < heads; ++k) items.push_back({row, first, std::min(kQueryTile, end - first), k, 1});
  }
  return items;
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> row_starts,
                          ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> tables, ffi::ResultBuffer<ffi::F32> out,
                          int64_t num_kv_heads, float scale, int64_t window, float softcap) {
  const auto q_shape = q.dimensions(), page_shape = pages.dimensions(), table_shape = tables.dimensions();
  const int64_t num_tokens = q_shape[0], num_rows = table_shape[0];
  const bool is_wide = pages.element_type() == ffi::F32;
  if ((!is_wide && pages.element_type() != ffi::BF16) || q_shape[2] % 16)
    return ffi::Error::InvalidArgument("attention takes pages of float32 or bfloat16 and head sizes that are a multiple of 16");
  static const Work f32 = Best<float>(), bf16 = Best<uint16_t>();
  const Work work = is_wide ? f32 : bf16;
  auto plan = std::make_shared<Plan>();
  plan->problem = {q.typed_data(), pages.untyped_data(), row_starts.typed_data(), kv_lens.typed_data(), tables.typed_data(),
                   out->typed_data(), page_shape[0], page_shape[1], table_shape[1], q_shape[1], num_kv_heads, q_shape[2], scale, softcap, window};
  plan->items = MakeItems(plan->problem, num_rows, num_tokens, pool.num_threads());
  const int64_t used = std::clamp<int64_t>(row_starts.typed_data()[num_rows], 0, num_tokens), row = q_shape[1] * q_shape[2];
  std::memset(out->typed_data() + used * row, 0, sizeof(float) * (num_tokens - used) * row);

  pjax::Share(pool, static_cast<int64_t>(plan->items.size()), [plan, work] {
    return [plan, work, scratch = std::make_shared<std::vector<float>>()](int64_t i) { work(plan->problem, plan->items[i], *scratch); };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxPagedAttention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("num_kv_heads")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));
