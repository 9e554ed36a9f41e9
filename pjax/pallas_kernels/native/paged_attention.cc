// Paged attention for CPUs, called by XLA through its foreign-function interface. Float32.
//
// The definition is reference.py's. Plain XLA (xla.py) has to copy each block of pages twice before a product can use
// it; here keys and values are read where they lie. Flash accumulation (Dao et al. 2022, algorithm 1) over blocks of
// pages. Work is cut into items, decode rows and tiles of prefill queries, that XLA's own threads take in turn.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "threads.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// One library for every x86: the loader picks the clone that fits the machine.
#define PJAX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define PJAX_CLONES
#endif
#define PJAX_INLINE inline __attribute__((always_inline))

constexpr int kBlock = 64;     // keys that one flash step takes
constexpr int kQueryTile = 16; // query tokens of a prefill item
constexpr int kRows = 4;       // query rows that share a load of keys or values
constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Problem {
  const float* q;            // [T, N, H]
  const float* pages;        // [P, G, 2·K·H]
  const int32_t* row_starts; // [S + 1]
  const int32_t* kv_lens;    // [S]
  const int32_t* tables;     // [S, W]
  float* out;                // [T, N, H]
  int64_t num_pages, page_size, table_width, num_heads, num_kv_heads;
  float scale, softcap;      // softcap 0: none
  int64_t window;            // 0: none
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

// Where the row of a token's keys and values begins.
PJAX_INLINE const float* Slot(const Problem& p, const int32_t* table, int64_t position, int64_t width) {
  int64_t page = std::clamp<int64_t>(table[position / p.page_size], 0, p.num_pages - 1);
  return p.pages + (page * p.page_size + position % p.page_size) * width;
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

// acc[r] = acc[r] · shrink[r] + Σ_j weights[r][j] · values[j] for R query rows.
template <int H, int R>
PJAX_INLINE void AddValues(const float* const* values, const float (*weights)[kBlock], const float* shrink, int count, float* acc) {
  float sum[R][H];
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < H; ++h) sum[r][h] = acc[r * H + h] * shrink[r];
  for (int j = 0; j < count; ++j) {
    const float* value = values[j];
    for (int r = 0; r < R; ++r) {
      float weight = weights[r][j];
      for (int h = 0; h < H; ++h) sum[r][h] += weight * value[h];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < H; ++h) acc[r * H + h] = sum[r][h];
}

// logits[r][j] = q[r] · keys[j], for a single query token: keys are read as they lie.
template <int H, int R>
PJAX_INLINE void DotRows(const float* q, const float* const* keys, int count, float (*logits)[kBlock]) {
  for (int j = 0; j < count; ++j) {
    const float* key = keys[j];
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int h = 0; h < H; ++h) sum += q[r * H + h] * key[h];
      logits[r][j] = sum;
    }
  }
}

// The same over keys turned to [H][kBlock]: no sum across a vector, worth it when many query rows share them.
template <int H, int R>
PJAX_INLINE void DotTurned(const float* q, const float (*turned)[kBlock], float (*logits)[kBlock]) {
  float sum[R][kBlock] = {};
  for (int h = 0; h < H; ++h)
    for (int r = 0; r < R; ++r) {
      float factor = q[r * H + h];
      for (int j = 0; j < kBlock; ++j) sum[r][j] += factor * turned[h][j];
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kBlock; ++j) logits[r][j] = sum[r][j];
}

// One flash step of R query rows [m, m + R) of an item and one KV head. visible(m, &low, &high) bounds the keys of a row.
template <int H, int R, bool kTurned, typename Visible>
PJAX_INLINE void Step(const Problem& p, const float* q, const float* const* keys, const float* const* values,
                      const float (*turned)[kBlock], int count, int m, const Visible& visible, float* top, float* total, float* acc) {
  alignas(64) float logits[R][kBlock];
  float shrink[R];
  if constexpr (kTurned)
    DotTurned<H, R>(q + m * H, turned, logits);
  else
    DotRows<H, R>(q + m * H, keys, count, logits);
  for (int r = 0; r < R; ++r) {
    int low, high;
    visible(m + r, &low, &high);
    shrink[r] = Soften(logits[r], low, high, p.softcap, &top[m + r], &total[m + r]);
  }
  AddValues<H, R>(values, logits, shrink, count, acc + m * H);
}

// All of an item. Scratch holds its queries and accumulators.
template <int H, bool kTurned>
PJAX_INLINE void Run(const Problem& p, const Item& item, std::vector<float>& scratch) {
  const int64_t width = 2 * p.num_kv_heads * H, ratio = p.num_heads / p.num_kv_heads;
  const int live = static_cast<int>(item.count * ratio);
  const int rows = kTurned ? (live + kRows - 1) / kRows * kRows : live;  // of a KV head; those past the live ones are idle
  const int all = rows * item.num_kv_heads;
  const int32_t* table = p.tables + item.row * p.table_width;
  const int64_t end = p.row_starts[item.row + 1], length = p.kv_lens[item.row];
  const int64_t position = length - (end - item.first);  // of the item's first query
  const int64_t last = position + item.count;            // keys [0, last) are visible to some query
  const int64_t begin = p.window > 0 ? std::max<int64_t>(position - p.window + 1, 0) / kBlock * kBlock : 0;

  scratch.assign(static_cast<size_t>(all) * (2 * H + 2), 0.0f);
  float *q = scratch.data(), *acc = q + all * H, *top = acc + all * H, *total = top + all;
  for (int k = 0; k < item.num_kv_heads; ++k)
    for (int m = 0; m < live; ++m) {
      const float* source = p.q + ((item.first + m / ratio) * p.num_heads + (item.kv_head + k) * ratio + m % ratio) * H;
      for (int h = 0; h < H; ++h) q[(k * rows + m) * H + h] = source[h] * p.scale;
    }
  std::fill(top, top + all, kMasked);

  alignas(64) float turned[kTurned ? H : 1][kBlock];
  const float *slots[kBlock], *keys[kBlock], *values[kBlock];
  for (int64_t first = begin; first < last; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, last - first));
    for (int j = 0; j < count; ++j) slots[j] = Slot(p, table, first + j, width);
    auto visible = [&](int m, int* low, int* high) {
      const int64_t seen = position + m / ratio + 1 - first;
      *high = static_cast<int>(std::clamp<int64_t>(seen, 0, count));
      *low = p.window > 0 ? static_cast<int>(std::clamp<int64_t>(seen - p.window, 0, *high)) : 0;
    };
    for (int k = 0; k < item.num_kv_heads; ++k) {
      for (int j = 0; j < count; ++j) {
        keys[j] = slots[j] + (item.kv_head + k) * H;
        values[j] = keys[j] + p.num_kv_heads * H;
      }
      if constexpr (kTurned) {
        for (int j = 0; j < count; ++j)
          for (int h = 0; h < H; ++h) turned[h][j] = keys[j][h];
        for (int h = 0; h < H; ++h)
          for (int j = count; j < kBlock; ++j) turned[h][j] = 0;
      }
      float *kq = q + k * rows * H, *kacc = acc + k * rows * H, *ktop = top + k * rows, *ktotal = total + k * rows;
      int m = 0;
      for (; m + kRows <= rows; m += kRows) Step<H, kRows, kTurned>(p, kq, keys, values, turned, count, m, visible, ktop, ktotal, kacc);
      if constexpr (!kTurned) {
        if (rows - m == 3) Step<H, 3, kTurned>(p, kq, keys, values, turned, count, m, visible, ktop, ktotal, kacc);
        if (rows - m == 2) Step<H, 2, kTurned>(p, kq, keys, values, turned, count, m, visible, ktop, ktotal, kacc);
        if (rows - m == 1) Step<H, 1, kTurned>(p, kq, keys, values, turned, count, m, visible, ktop, ktotal, kacc);
      }
    }
  }

  for (int k = 0; k < item.num_kv_heads; ++k)
    for (int m = 0; m < live; ++m) {
      float* target = p.out + ((item.first + m / ratio) * p.num_heads + (item.kv_head + k) * ratio + m % ratio) * H;
      const float sum = total[k * rows + m], factor = sum > 0 ? 1.0f / sum : 0.0f;
      for (int h = 0; h < H; ++h) target[h] = acc[(k * rows + m) * H + h] * factor;
    }
}

template <int H>
struct Worker {
  PJAX_CLONES static void Decode(const Problem& p, const Item& item, std::vector<float>& scratch) { Run<H, false>(p, item, scratch); }
  PJAX_CLONES static void Prefill(const Problem& p, const Item& item, std::vector<float>& scratch) { Run<H, true>(p, item, scratch); }
};

using Work = void (*)(const Problem&, const Item&, std::vector<float>&);

struct Plan {
  Problem problem;
  std::vector<Item> items;
  Work decode, prefill;
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

template <int H>
void Choose(Plan* plan) {
  plan->decode = Worker<H>::Decode;
  plan->prefill = Worker<H>::Prefill;
}

bool ChooseFor(int64_t head_size, Plan* plan) {
  switch (head_size) {
    case 64: Choose<64>(plan); return true;
    case 80: Choose<80>(plan); return true;
    case 96: Choose<96>(plan); return true;
    case 112: Choose<112>(plan); return true;
    case 128: Choose<128>(plan); return true;
    case 256: Choose<256>(plan); return true;
    default: return false;
  }
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> pages, ffi::Buffer<ffi::S32> row_starts,
                          ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> tables, ffi::ResultBuffer<ffi::F32> out,
                          int64_t num_kv_heads, float scale, int64_t window, float softcap) {
  const auto q_shape = q.dimensions(), page_shape = pages.dimensions(), table_shape = tables.dimensions();
  const int64_t num_tokens = q_shape[0], num_rows = table_shape[0];
  auto plan = std::make_shared<Plan>();
  if (!ChooseFor(q_shape[2], plan.get())) return ffi::Error::InvalidArgument("head size is not supported");
  plan->problem = {q.typed_data(), pages.typed_data(), row_starts.typed_data(), kv_lens.typed_data(), tables.typed_data(),
                    out->typed_data(), page_shape[0], page_shape[1], table_shape[1], q_shape[1], num_kv_heads, scale, softcap, window};
  plan->items = MakeItems(plan->problem, num_rows, num_tokens, pool.num_threads());
  const int64_t used = std::clamp<int64_t>(row_starts.typed_data()[num_rows], 0, num_tokens), row = q_shape[1] * q_shape[2];
  std::memset(out->typed_data() + used * row, 0, sizeof(float) * (num_tokens - used) * row);

  pjax::Share(pool, static_cast<int64_t>(plan->items.size()), [plan] {
    return [plan, scratch = std::make_shared<std::vector<float>>()](int64_t i) {
      const Item& item = plan->items[i];
      (item.count == 1 ? plan->decode : plan->prefill)(plan->problem, item, *scratch);
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PjaxPagedAttention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("num_kv_heads")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));
