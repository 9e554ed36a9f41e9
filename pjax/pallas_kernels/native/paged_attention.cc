// Paged attention for CPUs, called by XLA through its foreign-function interface. Float32; pages of float32 or bfloat16.
//
// The definition is reference.py's. Plain XLA (xla.py) has to copy each block of pages twice before a product can use
// it; here keys and values are read where they lie. Flash accumulation (Dao et al. 2022, algorithm 1) over blocks of
// keys. Work is cut into items, decode rows and tiles of prefill queries, that XLA's own threads take in turn; where decode
// rows are fewer than threads need, each is cut along its keys too (Flash-Decoding, Dao et al. 2023).

#include <algorithm>
#include <atomic>
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
constexpr int kLeastPart = 32;  // keys, of a decode row that is cut
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
  int64_t most_parts;         // that a decode row's keys are cut into
  float* parts;               // [decode tokens, most_parts, N·(H + 2)] where that is more than one: sums of Rows
  std::atomic<int32_t>* left; // [decode tokens] parts that are not done
};

// Query tokens [first, first + count) of one row, for KV heads [kv_head, kv_head + num_kv_heads), and of the keys that they
// see part `part` of `parts`.
struct Item {
  int32_t row, first, count, kv_head, num_kv_heads, part, parts;
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
  if (most == kMasked) {  // nothing is visible, or NaN, which is greater than nothing and has to stay
    for (int j = low; j < high; ++j) *total += logits[j] != logits[j] ? logits[j] : 0.0f;
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

// Keys or values of one head and one block, and those that come after them, which decode fetches meanwhile.
template <typename T>
struct Strip {
  const T *const *row, *const *next_row;
  int64_t offset, next_offset;
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
PJAX_INLINE void Score(const float* q, int64_t head_size, const Strip<T>& strip, int low, int high,
                       float (*logits)[kBlock]) {
  using F = typename Lanes<W>::F;
  for (int j = low / kKeys * kKeys; j < high; j += kKeys) {
    F sum[kKeys][R] = {};
    for (int64_t h = 0; h < head_size; h += W) {
      F factors[R];
      PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(Load<W>(q + r * head_size + h));
      PJAX_UNROLL for (int k = 0; k < kKeys; ++k) {
        if constexpr (kFetch) __builtin_prefetch(strip.next_row[j + k] + strip.next_offset + h);
        const F key = Held(Load<W>(strip.row[j + k] + strip.offset + h));
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
PJAX_INLINE void AddSome(const float (*weights)[kBlock], const float* shrink, int64_t head_size, const Strip<T>& strip, int low, int high, int64_t h, float* acc) {
  using F = typename Lanes<W>::F;
  F sum[R][V];
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Load<W>(acc + r * head_size + h + v * W) * shrink[r];
  for (int j = low; j < high; ++j) {
    F factors[R];
    PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(F{} + weights[r][j]);
    PJAX_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kFetch) __builtin_prefetch(strip.next_row[j] + strip.next_offset + h + v * W);
      const F value = Held(Load<W>(strip.row[j] + strip.offset + h + v * W));
      PJAX_UNROLL for (int r = 0; r < R; ++r) sum[r][v] += value * factors[r];
    }
  }
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) std::memcpy(acc + r * head_size + h + v * W, &sum[r][v], sizeof(F));
}

// The same for the whole head.
template <int W, int R, bool kFetch, typename T>
PJAX_INLINE void Add(const float (*weights)[kBlock], const float* shrink, int64_t head_size, const Strip<T>& strip, int low, int high, float* acc) {
  constexpr int kWide = R == 1 ? 8 : 4;  // enough sums to hide the latency of an addition, no more than there are registers for
  int64_t h = 0;
  auto add = [&](auto vectors) __attribute__((always_inline)) {
    for (; h + vectors() * W <= head_size; h += vectors() * W)
      AddSome<W, R, vectors(), kFetch>(weights, shrink, head_size, strip, low, high, h, acc);
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
PJAX_INLINE void Step(const Problem& p, const Rows& rows, Strip<T> strip, const int* low, const int* high, int m) {
  const int first = *std::min_element(low + m, low + m + R), last = *std::max_element(high + m, high + m + R);
  if (last == 0) return;
  alignas(64) float logits[R][kBlock];
  float shrink[R];
  const int64_t size = p.head_size, values = p.num_kv_heads * size;
  Score<W, R, kFetch>(rows.q + m * size, size, strip, first, last, logits);
  for (int r = 0; r < R; ++r)
    shrink[r] = Soften(logits[r], low[m + r], high[m + r], p.softcap, &rows.top[m + r], &rows.total[m + r]);
  strip.offset += values, strip.next_offset += values;
  Add<W, R, kFetch>(logits, shrink, size, strip, first, last, rows.acc + m * size);
}

// out[h] of query row m of `all`, from the sums of all parts.
PJAX_INLINE void Merge(const float* parts, int64_t sums, int num_parts, int64_t m, int64_t all, int64_t size, float* out) {
  const float* top = parts + all * size + m;
  float most = kMasked, total = 0;
  for (int i = 0; i < num_parts; ++i) most = std::max(most, top[i * sums]);
  auto weight = [&](int i) { return top[i * sums] == kMasked ? 0.0f : Exp(top[i * sums] - most); };
  for (int i = 0; i < num_parts; ++i) total += weight(i) * top[i * sums + all];
  std::fill(out, out + size, 0.0f);
  for (int i = 0; i < num_parts; ++i) {
    const float factor = total == 0 ? 0.0f : weight(i) / total, *acc = parts + i * sums + m * size;
    for (int64_t h = 0; h < size; ++h) out[h] += acc[h] * factor;
  }
}

// All of an item. Scratch holds its queries, and its sums where it is no part.
template <int W, int N, bool kDecode, typename T>
PJAX_INLINE void Run(const Problem& p, const Item& item, std::vector<float>& scratch) {
  const int64_t ratio = p.num_heads / p.num_kv_heads, size = p.head_size;
  const int rows = static_cast<int>(item.count * ratio), all = rows * item.num_kv_heads;
  const int32_t* table = p.tables + item.row * p.table_width;
  const int64_t end = p.row_starts[item.row + 1], length = p.kv_lens[item.row];
  const int64_t position = length - (end - item.first);  // of the item's first query
  const int64_t last = position + item.count;            // keys [0, last) are visible to some query
  const int64_t begin = p.window > 0 ? std::max<int64_t>(position - p.window + 1, 0) / kBlock * kBlock : 0;

  const int64_t piece = (last - begin + 4 * item.parts - 1) / (4 * item.parts) * 4;  // keys of this part: [from, to)
  const int64_t from = begin + item.part * piece, to = std::min(last, from + piece);

  const int64_t sums = all * (size + 2);  // numbers of a part
  scratch.resize(all * size + sums);
  float* parts = item.parts == 1 ? scratch.data() + all * size : p.parts + item.first * p.most_parts * sums;
  float *q = scratch.data(), *acc = parts + item.part * sums, *top = acc + all * size, *total = top + all;
  auto of_head = [&](int k) { return Rows{q + k * rows * size, acc + k * rows * size, top + k * rows, total + k * rows}; };
  auto place = [&](int k, int m) {  // of a query row in q and out
    return ((item.first + m / ratio) * p.num_heads + (item.kv_head + k) * ratio + m % ratio) * size;
  };
  for (int k = 0; k < item.num_kv_heads; ++k)
    for (int m = 0; m < rows; ++m) {
      const float* source = p.q + place(k, m);
      for (int64_t h = 0; h < size; ++h) q[(k * rows + m) * size + h] = source[h] * p.scale;
    }
  std::fill(acc, acc + sums, 0.0f);
  std::fill(top, top + all, kMasked);

  std::vector<int> bounds(2 * rows);  // the keys of a block that a query row sees: [low, high)
  int *low = bounds.data(), *high = low + rows;
  Slots<T> slots[2];
  int turn = 0;
  auto find = [&](int64_t first, Slots<T>* found) { Find(p, table, first, static_cast<int>(std::min<int64_t>(kBlock, to - first)), found); };
  if (from < to) find(from, &slots[0]);
  for (int64_t first = from; first < to; first += kBlock, turn ^= 1) {
    const Slots<T>& now = slots[turn];
    const bool is_last = first + kBlock >= to;
    if (!is_last) find(first + kBlock, &slots[turn ^ 1]);
    const Slots<T>& next = slots[is_last ? turn : turn ^ 1];
    for (int m = 0; m < rows; ++m) {
      const int64_t seen = position + m / ratio + 1 - first;
      high[m] = static_cast<int>(std::clamp<int64_t>(seen, 0, now.count));
      low[m] = p.window > 0 ? static_cast<int>(std::clamp<int64_t>(seen - p.window, 0, high[m])) : 0;
    }
    for (int k = 0; k < item.num_kv_heads; ++k) {
      const bool is_next_head = k + 1 < item.num_kv_heads;
      const int64_t offset = (item.kv_head + k) * size;
      const Strip<T> strip{now.row, is_next_head ? now.row : next.row, offset, is_next_head ? offset + size : item.kv_head * size};
      int m = 0;
      auto step = [&](auto count) __attribute__((always_inline)) {
        for (; m + count() <= rows; m += count()) Step<W, count(), kDecode>(p, of_head(k), strip, low, high, m);
      };
      step(std::integral_constant<int, N>());
      if constexpr (N > 3) step(std::integral_constant<int, 3>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 1>());
    }
  }

  if (item.parts > 1 && p.left[item.first].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  for (int k = 0; k < item.num_kv_heads; ++k)  // whoever is last brings the parts together
    for (int m = 0; m < rows; ++m) Merge(parts, sums, item.parts, k * rows + m, all, size, p.out + place(k, m));
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
  std::unique_ptr<float[]> parts;  // each is cleared by the thread that takes it
  std::unique_ptr<std::atomic<int32_t>[]> left;
};

// Decode rows are items whole, since a token's heads lie side by side; cut along their keys where threads would have none.
void MakeItems(Plan* plan, int64_t num_rows, int64_t num_tokens, int64_t num_threads) {
  Problem& p = plan->problem;
  const int32_t heads = static_cast<int32_t>(p.num_kv_heads);
  p.most_parts = num_tokens >= 2 * num_threads ? 1 : num_threads % num_tokens == 0 ? num_threads / num_tokens : (2 * num_threads + num_tokens - 1) / num_tokens;
  if (p.most_parts > 1) {
    plan->parts.reset(new float[num_tokens * p.most_parts * p.num_heads * (p.head_size + 2)]);
    plan->left.reset(new std::atomic<int32_t>[num_tokens]);
    p.parts = plan->parts.get();
    p.left = plan->left.get();
  }
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t start = p.row_starts[row], end = std::min<int32_t>(p.row_starts[row + 1], num_tokens);
    if (end - start == 1) {
      const int64_t keys = p.window > 0 ? std::min<int64_t>(p.window, p.kv_lens[row]) : p.kv_lens[row];
      const int32_t parts = static_cast<int32_t>(std::clamp<int64_t>(keys / kLeastPart, 1, p.most_parts));
      if (parts > 1) p.left[start] = parts;
      for (int32_t part = 0; part < parts; ++part) plan->items.push_back({row, start, 1, 0, heads, part, parts});
    }
    if (end - start < 2) continue;
    for (int32_t first = start; first < end; first += kQueryTile)
      for (int32_t k = 0; k < heads; ++k) plan->items.push_back({row, first, std::min(kQueryTile, end - first), k, 1, 0, 1});
  }
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
                   out->typed_data(), page_shape[0], page_shape[1], table_shape[1], q_shape[1], num_kv_heads, q_shape[2], scale, softcap, window, 1, nullptr, nullptr};
  MakeItems(plan.get(), num_rows, num_tokens, pool.num_threads());
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
