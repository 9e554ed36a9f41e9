// Paged attention for CPUs, called by XLA through its foreign-function interface. Float32; pages of float32 or bfloat16.
//
// The definition is reference.py's. Plain XLA (xla.py) has to copy each block of pages twice before a product can use
// it; here keys and values are read where they lie. Flash accumulation (Dao et al. 2022, algorithm 1) over blocks of
// keys. Work is cut into items, decode rows and tiles of prefill queries, that XLA's own threads take in turn; where decode
// rows are fewer than threads need, each is cut along its keys too (Flash-Decoding, Dao et al. 2023). A decode row is bound by
// memory: its vectors lie along a head. Prefill is bound by arithmetic: there a vector is one number of several query rows, so that
// nothing is summed across lanes.

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

constexpr int kBlock = 64;      // keys that one flash step of prefill takes
constexpr int kSpan = 16;       // keys that one of decode takes
constexpr int kTileRows = 48;   // query rows of a prefill item: its tokens times the heads that share a KV head
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

// e^x of each x <= 0 within 2 units in the last place (Cody and Waite's reduction).
template <int W>
PJAX_INLINE typename Lanes<W>::F Exp(typename Lanes<W>::F x) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  const F bounded = x < -87.0f ? Spread<W>(-87.0f) : x;
  const I whole = __builtin_convertvector(bounded * 1.44269504f - 0.5f, I);  // towards zero, from below
  const F n = __builtin_convertvector(whole, F);
  const F r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I bits = (whole + 127) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof bits);
  return x < -87.0f ? F{} : p * power;
}
PJAX_INLINE float Exp(float x) { return Exp<4>(Spread<4>(x))[0]; }

// The greatest of W numbers, none of which is NaN.
template <int W>
PJAX_INLINE float Most(typename Lanes<W>::F v) {
  if constexpr (W == 1) {
    return v[0];
  } else {
    typename Lanes<W / 2>::F halves[2];
    std::memcpy(halves, &v, sizeof v);
    return Most<W / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

// Turns logits [kSpan] of which [low, high) are visible into weights, and keeps the running maximum and sum.
// Returns the factor by which what was accumulated before shrinks.
template <int W>
PJAX_INLINE float Soften(float* logits, int low, int high, float softcap, float* top, float* total) {
  using F = typename Lanes<W>::F;
  if (softcap > 0)
    for (int j = low; j < high; ++j) logits[j] = softcap * std::tanh(logits[j] / softcap);
  for (int j = 0; j < low; ++j) logits[j] = kMasked;
  for (int j = high; j < kSpan; ++j) logits[j] = kMasked;
  F most_of = Spread<W>(*top);
  PJAX_UNROLL for (int j = 0; j < kSpan; j += W) {
    const F some = Load<W>(logits + j);
    most_of = some > most_of ? some : most_of;
  }
  const float most = Most<W>(most_of);
  if (most == kMasked) {  // nothing is visible, or NaN, which is greater than nothing and has to stay
    for (int j = low; j < high; ++j) *total += logits[j] != logits[j] ? logits[j] : 0.0f;
    for (int j = 0; j < kSpan; ++j) logits[j] = 0;
    return 1.0f;
  }
  F sums = {};
  PJAX_UNROLL for (int j = 0; j < kSpan; j += W) {
    const F weights = Exp<W>(Load<W>(logits + j) - most);
    std::memcpy(logits + j, &weights, sizeof weights);
    sums += weights;
  }
  const Four four = Fold<W>(sums);
  const float shrink = *top == most ? 1.0f : Exp(*top - most);
  *total = *total * shrink + ((four[0] + four[1]) + (four[2] + four[3]));
  *top = most;
  return shrink;
}

// The rows of B keys and values in the pool, the first `count` of them; the rest repeat the last one.
template <typename T, int B>
struct Slots {
  const T* row[B];
  int count;
};

// Keys or values of one head and one span.
template <typename T>
struct Strip {
  const T* const* row;
  int64_t offset;
};

// Lines of the span that comes next, fetched in the order in which they lie (memory is slower where a head's keys are fetched on their
// own, 256 bytes of each 1.5 kB), some at a time and all the time: where many come at once, products wait for them.
template <typename T>
struct Fetch {
  const T* const* row;
  int64_t bytes;  // of a row
  int count, some;
  int64_t at = 0;
  int j = 0;

  PJAX_INLINE void Some() {
    for (int i = 0; i < some && j < count; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(row[j]) + at);
      if ((at += 64) >= bytes) at = 0, ++j;
    }
  }
};

template <typename T, int B>
PJAX_INLINE void Find(const Problem& p, const int32_t* table, int64_t first, int count, Slots<T, B>* slots) {
  const int64_t width = 2 * p.num_kv_heads * p.head_size;
  int64_t column = first / p.page_size, offset = first % p.page_size;
  for (int j = 0; j < count; ++column, offset = 0) {
    const int64_t page = std::clamp<int64_t>(table[column], 0, p.num_pages - 1);
    const T* row = static_cast<const T*>(p.pages) + (page * p.page_size + offset) * width;
    for (; j < count && offset < p.page_size; ++j, ++offset, row += width) slots->row[j] = row;
  }
  for (int j = count; j < B; ++j) slots->row[j] = slots->row[count - 1];
  slots->count = count;
}

// logits[r][j] = q[r] · key j for R query rows and, at least, j in [low, high).
template <int W, int R, typename T>
PJAX_INLINE void Score(const float* q, int64_t head_size, const Strip<T>& strip, Fetch<T>& fetch, int low, int high,
                       float (*logits)[kSpan]) {
  using F = typename Lanes<W>::F;
  for (int j = low / kKeys * kKeys; j < high; j += kKeys) {
    fetch.Some();
    F sum[kKeys][R] = {};
    for (int64_t h = 0; h < head_size; h += W) {
      F factors[R];
      PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(Load<W>(q + r * head_size + h));
      PJAX_UNROLL for (int k = 0; k < kKeys; ++k) {
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
template <int W, int R, int V, typename T>
PJAX_INLINE void AddSome(const float (*weights)[kSpan], const float* shrink, int64_t head_size, const Strip<T>& strip, Fetch<T>& fetch,
                         int low, int high, int64_t h, float* acc) {
  using F = typename Lanes<W>::F;
  F sum[R][V];
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Load<W>(acc + r * head_size + h + v * W) * shrink[r];
  for (int j = low; j < high; ++j) {
    if (j % kKeys == 0) fetch.Some();
    F factors[R];
    PJAX_UNROLL for (int r = 0; r < R; ++r) factors[r] = Held(F{} + weights[r][j]);
    PJAX_UNROLL for (int v = 0; v < V; ++v) {
      const F value = Held(Load<W>(strip.row[j] + strip.offset + h + v * W));
      PJAX_UNROLL for (int r = 0; r < R; ++r) sum[r][v] += value * factors[r];
    }
  }
  PJAX_UNROLL for (int r = 0; r < R; ++r)
    PJAX_UNROLL for (int v = 0; v < V; ++v) std::memcpy(acc + r * head_size + h + v * W, &sum[r][v], sizeof(F));
}

// Vectors of a head that are added to at a time: enough sums to hide the latency of an addition, no more than there are registers for.
constexpr int Wide(int rows) { return rows == 1 ? 8 : 4; }

// How often a step of so many query rows fetches for each kKeys keys: once in Score, and once for each part of the head in Add.
template <int W>
PJAX_INLINE int64_t Fetches(int rows, int64_t head_size) {
  const int64_t rest = head_size % (Wide(rows) * W);
  return 1 + head_size / (Wide(rows) * W) + rest / (4 * W) + rest % (4 * W) / 16;
}

// The same for the whole head.
template <int W, int R, typename T>
PJAX_INLINE void Add(const float (*weights)[kSpan], const float* shrink, int64_t head_size, const Strip<T>& strip, Fetch<T>& fetch,
                     int low, int high, float* acc) {
  constexpr int kWide = Wide(R);
  int64_t h = 0;
  auto add = [&](auto vectors) __attribute__((always_inline)) {
    for (; h + vectors() * W <= head_size; h += vectors() * W)
      AddSome<W, R, vectors()>(weights, shrink, head_size, strip, fetch, low, high, h, acc);
  };
  add(std::integral_constant<int, kWide>());
  if constexpr (kWide > 4) add(std::integral_constant<int, 4>());
  if constexpr (W > 4) add(std::integral_constant<int, 16 / W>());  // a head is a multiple of 16 numbers
}

// What an item accumulates, for the query rows of one of its KV heads.
struct Rows {
  float *q, *acc, *top, *total;  // [rows, H], [rows, H], [rows], [rows]
};

// One flash step of the query rows [m, m + R) and one KV head, over keys [low, high) of a span.
template <int W, int R, typename T>
PJAX_INLINE void Step(const Problem& p, const Rows& rows, Strip<T> strip, Fetch<T>& fetch, int low, int high, int m) {
  alignas(64) float logits[R][kSpan];
  float shrink[R];
  const int64_t size = p.head_size, values = p.num_kv_heads * size;
  Score<W, R>(rows.q + m * size, size, strip, fetch, low, high, logits);
  for (int r = 0; r < R; ++r) {
    fetch.Some();
    shrink[r] = Soften<W>(logits[r], low, high, p.softcap, &rows.top[m + r], &rows.total[m + r]);
  }
  strip.offset += values;
  Add<W, R>(logits, shrink, size, strip, fetch, low, high, rows.acc + m * size);
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

// All of a decode item. Scratch holds its queries, and its sums where it is no part.
template <int W, int N, typename T>
PJAX_INLINE void RunDecode(const Problem& p, const Item& item, std::vector<float>& scratch) {
  const int64_t size = p.head_size;
  const int rows = static_cast<int>(p.num_heads / p.num_kv_heads), all = rows * item.num_kv_heads;
  const int32_t* table = p.tables + item.row * p.table_width;
  const int64_t last = p.kv_lens[item.row] - (p.row_starts[item.row + 1] - item.first) + 1;
  const int64_t seen = p.window > 0 ? std::max<int64_t>(last - p.window, 0) : 0;  // keys [seen, last)
  const int64_t begin = seen / kSpan * kSpan;
  const int64_t piece = (last - begin + 4 * item.parts - 1) / (4 * item.parts) * 4;  // keys of this part: [from, to)
  const int64_t from = begin + item.part * piece, to = std::min(last, from + piece);

  const int64_t sums = all * (size + 2);  // numbers of a part
  scratch.resize(all * size + sums);
  float* parts = item.parts == 1 ? scratch.data() + all * size : p.parts + item.first * p.most_parts * sums;
  float *q = scratch.data(), *acc = parts + item.part * sums, *top = acc + all * size, *total = top + all;
  auto of_head = [&](int k) { return Rows{q + k * rows * size, acc + k * rows * size, top + k * rows, total + k * rows}; };
  const int64_t place = (item.first * p.num_heads + item.kv_head * rows) * size;  // of the first query row in q and out
  for (int64_t i = 0; i < all * size; ++i) q[i] = p.q[place + i] * p.scale;
  std::fill(acc, acc + sums, 0.0f);
  std::fill(top, top + all, kMasked);

  Slots<T, kSpan> slots[2];
  int turn = 0;
  auto find = [&](int64_t first, Slots<T, kSpan>* found) { Find(p, table, first, static_cast<int>(std::min<int64_t>(kSpan, to - first)), found); };
  const int64_t row_bytes = 2 * p.num_kv_heads * size * static_cast<int64_t>(sizeof(T));
  int64_t times = rows;  // that a head's steps fetch: once for each row, between Score and Add
  for (int m = 0, count; m < rows; m += count) {
    count = rows - m >= N ? N : std::min(rows - m, 3);
    times += Fetches<W>(count, size) * kSpan / kKeys;
  }
  times *= item.num_kv_heads;
  const int some = static_cast<int>((kSpan * row_bytes / 64 + times - 1) / times);
  if (from < to) {
    find(from, &slots[0]);
    Fetch<T>{slots[0].row, row_bytes, slots[0].count, kSpan * 64}.Some();
  }
  for (int64_t first = from; first < to; first += kSpan, turn ^= 1) {
    const Slots<T, kSpan>& now = slots[turn];
    const bool is_last = first + kSpan >= to;
    if (!is_last) find(first + kSpan, &slots[turn ^ 1]);
    const int low = static_cast<int>(std::clamp<int64_t>(seen - first, 0, now.count));
    if (low == now.count) continue;
    Fetch<T> fetch{slots[turn ^ 1].row, row_bytes, is_last ? 0 : slots[turn ^ 1].count, some};
    for (int k = 0; k < item.num_kv_heads; ++k) {
      const Strip<T> strip{now.row, (item.kv_head + k) * size};
      int m = 0;
      auto step = [&](auto count) __attribute__((always_inline)) {
        for (; m + count() <= rows; m += count()) Step<W, count()>(p, of_head(k), strip, fetch, low, now.count, m);
      };
      step(std::integral_constant<int, N>());
      if constexpr (N > 3) step(std::integral_constant<int, 3>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 1>());
    }
  }

  if (item.parts > 1 && p.left[item.first].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  for (int m = 0; m < all; ++m) Merge(parts, sums, item.parts, m, all, size, p.out + place + m * size);  // whoever is last
}

// What a prefill item accumulates for V vectors of query rows: each is one number of W rows.
struct Packed {
  float *q, *acc;         // [V, H, W]
  float *top, *total;     // [V, W]
  const int *low, *high;  // [V, W]: the keys of a block that a query row sees are [low, high)
};

// Keys or values of one head and one block.
using Block = const float* [kBlock];

// weights[j] = q · key j for V vectors of query rows and, at least, j in [first, last).
template <int W, int V>
PJAX_INLINE void PackedScore(const float* q, int64_t size, const Block& keys, int first, int last, typename Lanes<W>::F (*weights)[V]) {
  using F = typename Lanes<W>::F;
  for (int j = first / kKeys * kKeys; j < last; j += kKeys) {
    F sum[kKeys][V] = {};
#pragma GCC unroll 4
    for (int64_t h = 0; h < size; ++h) {
      F factors[V];
      PJAX_UNROLL for (int v = 0; v < V; ++v) factors[v] = Held(Load<W>(q + (v * size + h) * W));
      PJAX_UNROLL for (int k = 0; k < kKeys; ++k) {
        const F key = Held(Spread<W>(keys[j + k][h]));
        PJAX_UNROLL for (int v = 0; v < V; ++v) sum[k][v] += key * factors[v];
      }
    }
    PJAX_UNROLL for (int k = 0; k < kKeys; ++k)
      PJAX_UNROLL for (int v = 0; v < V; ++v) weights[j + k][v] = sum[k][v];
  }
}

// Soften for V vectors: each lane has keys [low, high) of its own, unless all see [first, last).
template <int W, int V>
PJAX_INLINE void PackedSoften(const Packed& rows, int first, int last, bool all, float softcap, typename Lanes<W>::F (*weights)[V],
                              typename Lanes<W>::F* shrink) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  if (softcap > 0)
    for (int j = first; j < last; ++j)
      for (int v = 0; v < V; ++v)
        for (int i = 0; i < W; ++i) weights[j][v][i] = softcap * std::tanh(weights[j][v][i] / softcap);
  if (!all) {
    I low[V], high[V];
    std::memcpy(low, rows.low, sizeof low);
    std::memcpy(high, rows.high, sizeof high);
    for (int j = first; j < last; ++j)
      PJAX_UNROLL for (int v = 0; v < V; ++v) weights[j][v] = (low[v] <= j) & (high[v] > j) ? weights[j][v] : Spread<W>(kMasked);
  }
  F top[V], most[V], base[V], sum[V] = {}, total[V];
  std::memcpy(top, rows.top, sizeof top);
  std::memcpy(total, rows.total, sizeof total);
  PJAX_UNROLL for (int v = 0; v < V; ++v) most[v] = top[v];
  for (int j = first; j < last; ++j)
    PJAX_UNROLL for (int v = 0; v < V; ++v) most[v] = weights[j][v] > most[v] ? weights[j][v] : most[v];
  // Where nothing is visible, or NaN, which is greater than nothing and has to stay:
  PJAX_UNROLL for (int v = 0; v < V; ++v) base[v] = most[v] == kMasked ? F{} : most[v];
  for (int j = first; j < last; ++j)
    PJAX_UNROLL for (int v = 0; v < V; ++v) sum[v] += weights[j][v] = Exp<W>(weights[j][v] - base[v]);
  PJAX_UNROLL for (int v = 0; v < V; ++v) {
    shrink[v] = Exp<W>(top[v] - base[v]);
    total[v] = total[v] * shrink[v] + sum[v];
  }
  std::memcpy(rows.top, most, sizeof most);
  std::memcpy(rows.total, total, sizeof total);
}

// acc = acc · shrink + Σ_j weights[j] · value j.
template <int W, int V>
PJAX_INLINE void PackedAdd(const typename Lanes<W>::F (*weights)[V], const typename Lanes<W>::F* shrink, int64_t size, const Block& values,
                           int first, int last, float* acc) {
  using F = typename Lanes<W>::F;
  constexpr int kSome = 4;  // numbers of the head
  for (int64_t h = 0; h < size; h += kSome) {
    F sum[kSome][V];
    PJAX_UNROLL for (int i = 0; i < kSome; ++i)
      PJAX_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = Load<W>(acc + (v * size + h + i) * W) * shrink[v];
    for (int j = first; j < last; ++j) {
      F factors[V];
      PJAX_UNROLL for (int v = 0; v < V; ++v) factors[v] = Held(weights[j][v]);
      PJAX_UNROLL for (int i = 0; i < kSome; ++i) {
        const F value = Held(Spread<W>(values[j][h + i]));
        PJAX_UNROLL for (int v = 0; v < V; ++v) sum[i][v] += value * factors[v];
      }
    }
    PJAX_UNROLL for (int i = 0; i < kSome; ++i)
      PJAX_UNROLL for (int v = 0; v < V; ++v) std::memcpy(acc + (v * size + h + i) * W, &sum[i][v], sizeof(F));
  }
}

// One flash step of V vectors.
template <int W, int V>
PJAX_INLINE void PackedStep(const Problem& p, const Packed& rows, const Block& keys, const Block& values) {
  const auto lows = std::minmax_element(rows.low, rows.low + V * W), highs = std::minmax_element(rows.high, rows.high + V * W);
  const int first = *lows.first, last = *highs.second;
  if (last == 0) return;
  typename Lanes<W>::F weights[kBlock][V], shrink[V];
  PackedScore<W, V>(rows.q, p.head_size, keys, first, last, weights);
  PackedSoften<W, V>(rows, first, last, first == *lows.second && last == *highs.first, p.softcap, weights, shrink);
  PackedAdd<W, V>(weights, shrink, p.head_size, values, first, last, rows.acc);
}

// All of a prefill item.
template <int W, typename T>
PJAX_INLINE void RunPrefill(const Problem& p, const Item& item, std::vector<float>& scratch) {
  using F = typename Lanes<W>::F;
  const int64_t ratio = p.num_heads / p.num_kv_heads, size = p.head_size;
  const int rows = static_cast<int>(item.count * ratio), vectors = (rows + W - 1) / W;
  const int64_t position = p.kv_lens[item.row] - (p.row_starts[item.row + 1] - item.first);  // of the item's first query
  const int64_t to = position + item.count;  // keys [begin, to) are visible to some query
  const int64_t begin = p.window > 0 ? std::max<int64_t>(position - p.window + 1, 0) / kBlock * kBlock : 0;

  const int64_t packed = vectors * W * size;
  scratch.resize(2 * packed + 2 * vectors * W + (sizeof(T) == 2 ? 2 * kBlock * size : 0));
  float *q = scratch.data(), *acc = q + packed, *top = acc + packed, *total = top + vectors * W, *widened = total + vectors * W;
  auto place = [&](int m) {  // of a query row in q and out
    return ((item.first + m / ratio) * p.num_heads + item.kv_head * ratio + m % ratio) * size;
  };
  for (int v = 0; v < vectors; ++v)
    for (int64_t h = 0; h < size; h += W) {
      F some[W];
      for (int i = 0; i < W; ++i) some[i] = v * W + i < rows ? Load<W>(p.q + place(v * W + i) + h) * p.scale : F{};
      Transpose<W>(some);
      std::memcpy(q + (v * size + h) * W, some, sizeof some);
    }
  std::fill(acc, acc + packed, 0.0f);
  std::fill(top, top + vectors * W, kMasked);
  std::fill(total, total + vectors * W, 0.0f);

  std::vector<int> bounds(2 * vectors * W);
  int *low = bounds.data(), *high = low + vectors * W;
  Slots<T, kBlock> slots;
  for (int64_t first = begin; first < to; first += kBlock) {
    Find(p, p.tables + item.row * p.table_width, first, static_cast<int>(std::min<int64_t>(kBlock, to - first)), &slots);
    Block keys, values;
    for (int j = 0; j < kBlock; ++j) {
      const T *key = slots.row[j] + item.kv_head * size, *value = key + p.num_kv_heads * size;
      if constexpr (sizeof(T) == 2) {
        float* to = widened + 2 * std::min(j, slots.count - 1) * size;
        if (j < slots.count) Widen<W>(key, value - key, 2, size, to, size);
        keys[j] = to, values[j] = to + size;
      } else {
        keys[j] = key, values[j] = value;
      }
    }
    for (int m = 0; m < vectors * W; ++m) {  // rows that are none see what the last one sees
      const int64_t seen = position + std::min(m, rows - 1) / ratio + 1 - first;
      high[m] = static_cast<int>(std::clamp<int64_t>(seen, 0, slots.count));
      low[m] = p.window > 0 ? static_cast<int>(std::clamp<int64_t>(seen - p.window, 0, high[m])) : 0;
    }
    int v = 0;
    auto step = [&](auto count) __attribute__((always_inline)) {
      const int64_t from = v * W;
      PackedStep<W, count()>(p, {q + from * size, acc + from * size, top + from, total + from, low + from, high + from}, keys, values);
      v += count();
    };
    while (vectors - v > 4 || vectors - v == 3) step(std::integral_constant<int, 3>());
    while (vectors - v > 1) step(std::integral_constant<int, 2>());
    if (vectors - v == 1) step(std::integral_constant<int, 1>());
  }

  for (int v = 0; v < vectors; ++v) {
    const F sum = Load<W>(total + v * W), factor = sum == 0 ? F{} : 1 / sum;
    for (int64_t h = 0; h < size; h += W) {
      F some[W];
      for (int i = 0; i < W; ++i) some[i] = Load<W>(acc + (v * size + h + i) * W) * factor;
      Transpose<W>(some);
      for (int i = 0; i < W && v * W + i < rows; ++i) std::memcpy(p.out + place(v * W + i) + h, &some[i], sizeof(F));
    }
  }
}

using Work = void (*)(const Problem&, const Item&, std::vector<float>&);

#define PJAX_WORK(name, attributes, W, N)                                                       \
  template <typename T>                                                                         \
  attributes void name##Work(const Problem& p, const Item& item, std::vector<float>& scratch) { \
    item.count == 1 ? RunDecode<W, N, T>(p, item, scratch) : RunPrefill<W, T>(p, item, scratch); \
  }
PJAX_FOR_EACH_WIDTH(PJAX_WORK)

template <typename T>
Work Best() {
  const Width width = WidestVectors();
#define PJAX_CHOOSE(name, attributes, W, N) \
  if (width == Width::name) return name##Work<T>;
  PJAX_FOR_EACH_WIDTH(PJAX_CHOOSE)
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
  const int32_t heads = static_cast<int32_t>(p.num_kv_heads), tile = std::max(static_cast<int32_t>(kTileRows * heads / p.num_heads), 1);
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
    for (int32_t first = start; first < end; first += tile)
      for (int32_t k = 0; k < heads; ++k) plan->items.push_back({row, first, std::min(tile, end - first), k, 1, 0, 1});
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
  const Work work = is_wide ? Best<float>() : Best<uint16_t>();
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
