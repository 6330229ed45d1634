// Decode attention over a layer's cache. Each (sequence, kv head) is cut into chunks of fixed size that threads take by
// a counter; whoever finishes a (sequence, kv head) merges its chunks in order, so that no result depends on who did
// what, on other sequences or on the number of threads.
#pragma once
#include <atomic>
#include <new>
#include <stdlib.h>
#include "rows.h"

enum { CHUNK_PAGES = 16, CHUNK = CHUNK_PAGES * PAGE, BLOCK = 2 * PAGE };

struct Attend {
  const void* q;                    // (items, kv_heads * GROUP, queries, DIM) of `dtype`, by strides in elements
  void* out;                        // the same shape and strides of its own
  int64_t q_stride[3], out_stride[3];
  int64_t dtype, items, queries;
  const int64_t* rows;              // (items,): each item's row in the cache, -1 for an idle one
  float scale, softcap;             // softcap 0: none
  int64_t window;                   // 0: none
  const float* sink_logits;         // (heads,) or null
};

template <class S> static constexpr float code_limit() {  // so that no sum of products leaves 32 bits
  return DIM * ((1 << S::bits) - 1) * 32766ll < (1ll << 31) ? 32766.f : 16383.f;
}
// x (DIM) as 16-bit numbers in units of what is returned, in the order of CodeRow's operands.
template <class S> static float quantize_query(const float* x, int32_t* operands) {
  constexpr int W = DIM % LANES ? 4 : LANES;
  Float<W> top = splat<W>(1e-30f);
  for (int d = 0; d < DIM; d += W) {
    Float<W> y = load<Float<W>>(x + d);
    top = maximum(top, maximum(y, -y));
  }
  float unit = largest<W>(top) / code_limit<S>();
  for (int d = 0; d < DIM; d += W)
    narrow(rounded(load<Float<W>>(x + d) * splat<W>(1.f / unit)), reinterpret_cast<int16_t*>(operands) + d, true);
  return unit;
}

// Scores of N queries with a page's keys. q: (N, DIM), scaled.
template <class S, int N> struct Keys {
  typedef typename RowOf<S>::type R;
  static constexpr bool by_channel = S::layout == CHANNEL;
  const float (*q)[DIM];
  alignas(64) int32_t operands[N][R::columns * R::parts];
  float unit[N], sum[N];

  Keys(const float (*queries)[DIM], const Store& store) : q(queries) {
    for (int n = 0; n < N; n++) {
      unit[n] = S::layout == FP8 && !S::token_scale ? store.tensor_scale : 1.f;
      if constexpr (R::integer && !by_channel) {
        unit[n] = quantize_query<S>(q[n], operands[n]);
        sum[n] = 0;
        for (int d = 0; d < DIM; d++) sum[n] += q[n][d];
      }
    }
  }
  void scores(const Store& store, int64_t page, float* out, int stride, const Ahead& ahead) {
    constexpr int W = LANES;
    if constexpr (by_channel) fold_scales(store, page);
    const uint8_t* rows = store.codes + page * PAGE * R::bytes;
    if constexpr (R::integer) page_dots<R, N>(operands, rows, out, stride, ahead);
    else page_dots<R, N>(q, rows, out, stride, ahead);
    for (int n = 0; n < N; n++)
      for (int t = 0; t < PAGE; t += W) {
        float* to = out + n * stride + t;
        Float<W> x = load<Float<W>>(to) * splat<W>(unit[n]);
        if constexpr (by_channel) x = x + splat<W>(sum[n]);
        else if constexpr (R::integer) {
          const uint16_t* scale = static_cast<const uint16_t*>(store.scale) + page * PAGE + t;
          x = fma(halves<W>(store.zero + page * PAGE + t), splat<W>(sum[n]), x * halves<W>(scale));
        } else if constexpr (S::token_scale)
          x = x * load<Float<W>>(static_cast<const float*>(store.scale) + page * PAGE + t);
        ::store(to, x);
      }
  }
  // A page's scale and zero of each channel go into the query: sum over channels of q * (code * scale + zero).
  void fold_scales(const Store& store, int64_t page) {
    constexpr int W = DIM % LANES ? 4 : LANES;
    const uint16_t *scale = static_cast<const uint16_t*>(store.scale) + page * DIM, *zero = store.zero + page * DIM;
    alignas(64) float x[DIM];
    for (int n = 0; n < N; n++) {
      Float<W> zeros = {};
      for (int d = 0; d < DIM; d += W) {
        Float<W> y = load<Float<W>>(q[n] + d);
        ::store(x + d, y * halves<W>(scale + d));
        zeros = fma(y, halves<W>(zero + d), zeros);
      }
      unit[n] = quantize_query<S>(x, operands[n]);
      sum[n] = total<W>(zeros);
    }
  }
};

// Weighted sums of values, chunk by chunk. p: (N, CHUNK).
template <class S, int N> struct Values {
  typedef typename RowOf<S>::type R;
  typedef FloatRow<S::dtype> Recent;
  static constexpr int groups = R::integer ? S::groups : 1;
  alignas(64) float sums[N][DIM], recent[N][DIM];
  float zeros[N][groups];

  Values() {
    memset(sums, 0, sizeof sums);
    memset(recent, 0, sizeof recent);
    memset(zeros, 0, sizeof zeros);
  }
  // Two pages at a time: `counts` of their tokens are in pages[i] of the pool.
  void add(const Store& store, const float* p, const int64_t* pages, const int* counts, const Ahead* ahead) {
    if constexpr (R::integer) {
      alignas(64) int16_t weights[N][groups][BLOCK];
      float unit[N][groups];
      const uint8_t* rows[2];
      int even[2];
      weigh(store, p, pages, counts, weights, unit);
      for (int i = 0; i < 2; i++) rows[i] = store.codes + pages[i] * PAGE * R::bytes, even[i] = (counts[i] + 1) & ~1;
      add_codes<R, N, groups>(weights, unit, rows, even, sums, ahead);
    } else {
      for (int i = 0; i < 2; i++) {
        if (!counts[i]) continue;
        const float* own = p + i * PAGE;
        int stride = CHUNK;
        alignas(64) float scaled[N][PAGE];
        if constexpr (S::token_scale) {
          const float* scale = static_cast<const float*>(store.scale) + pages[i] * PAGE;
          for (int n = 0; n < N; n++)
            for (int t = 0; t < counts[i]; t++) scaled[n][t] = own[n * CHUNK + t] * scale[t];
          own = scaled[0], stride = PAGE;
        }
        add_rows<R, N>(own, stride, store.codes + pages[i] * PAGE * R::bytes, counts[i], sums, ahead[i]);
      }
    }
  }
  // Each token's weight times its group's scale as 16-bit numbers, in units of their largest / 32766.
  void weigh(const Store& store, const float* p, const int64_t* pages, const int* counts,
             int16_t (*weights)[groups][BLOCK], float (*unit)[groups]) {
    constexpr int W = LANES;
    alignas(64) float scale[groups][BLOCK], zero[groups][BLOCK], product[BLOCK];
    for (int i = 0; i < 2; i++) {
      const int64_t first = pages[i] * PAGE * groups;
      spread(static_cast<const uint16_t*>(store.scale) + first, counts[i], &scale[0][i * PAGE]);
      spread(store.zero + first, counts[i], &zero[0][i * PAGE]);
    }
    for (int n = 0; n < N; n++)
      for (int k = 0; k < groups; k++) {
        Float<W> top = splat<W>(1e-30f), sum = {};
        for (int t = 0; t < BLOCK; t += W) {
          Float<W> x = load<Float<W>>(p + n * CHUNK + t), y = x * load<Float<W>>(&scale[k][t]);
          sum = fma(x, load<Float<W>>(&zero[k][t]), sum);
          top = maximum(top, y);
          ::store(product + t, y);
        }
        zeros[n][k] += total<W>(sum);
        unit[n][k] = largest<W>(top) / 32766.f;
        Float<W> inverse = splat<W>(1.f / unit[n][k]);
        for (int t = 0; t < BLOCK; t += W) narrow(rounded(load<Float<W>>(product + t) * inverse), &weights[n][k][t], false);
      }
  }
  // A page's (tokens, groups) float16 numbers as (groups, BLOCK) float32; 0 from `count` tokens on, where any bits may be.
  static void spread(const uint16_t* from, int count, float* to) {
    constexpr int W = LANES;
    if (!count) {
      for (int k = 0; k < groups; k++) memset(to + k * BLOCK, 0, PAGE * 4);
      return;
    }
    alignas(64) float x[PAGE * groups];
    for (int i = 0; i < PAGE * groups; i += W) ::store(x + i, halves<W>(from + i));
    for (int i = count * groups; i < PAGE * groups; i++) x[i] = 0;
    for (int k = 0; k < groups; k++)
      for (int t = 0; t < PAGE; t++) to[k * BLOCK + t] = x[t * groups + k];
  }
  void add_recent(const float* p, const void* rows, int count) {
    add_rows<Recent, N>(p, CHUNK, static_cast<const uint8_t*>(rows), count, recent, {nullptr, 0});
  }
  void result(const Store& store, float (*out)[DIM]) {
    const float tensor_scale = S::layout == FP8 && !S::token_scale ? store.tensor_scale : 1.f;
    for (int n = 0; n < N; n++) {
      for (int i = 0; i < DIM; i++) {
        if constexpr (R::integer) {
          int d = channel_of_code_sum<R, groups>(i);
          out[n][d] = sums[n][i] + zeros[n][d / (DIM / groups)];
        } else
          out[n][channel_of_sum<R>(i)] = sums[n][i] * tensor_scale;
      }
      if (S::residual)
        for (int i = 0; i < DIM; i++) out[n][channel_of_sum<Recent>(i)] += recent[n][i];
    }
  }
};

// One chunk of one (sequence, kv head).
struct Piece {
  int64_t row, head, slots, seen, first;  // first: of the chunk's slots
  const int32_t* table;                   // its pages, from column 0
  int pages;                              // of the chunk, the last one perhaps partly filled
};
// Which slots of a page a query at `position` reads: all lanes set. Returns whether there are any.
static bool readable(const Cache& c, const Piece& at, int page, int64_t position, int64_t window, int32_t* mask) {
  constexpr int W = LANES;
  const int64_t first = at.first + page * PAGE, oldest = window && position >= window ? position - window + 1 : 0;
  Int<W> any = {}, lowest = splat<W>(int32_t(oldest)), highest = splat<W>(int32_t(position));
  for (int t = 0; t < PAGE; t += W) {
    Int<W> slot = lane_numbers<W>() + int32_t(first + t), where = slot;
    if (c.positions) where = load<Int<W>>(c.positions + int64_t(at.table[first / PAGE]) * PAGE + t);
    Int<W> yes = (Int<W>)(where >= lowest) & (Int<W>)(where <= highest) & (Int<W>)(slot < int32_t(at.slots));
    any |= yes;
    store(mask + t, yes);
  }
  for (int i = 0; i < W; i++)
    if (any[i]) return true;
  return false;
}
// A page's slots from s on, in a residual.
template <class S> INLINE const uint8_t* recent_rows(const Cache& c, const Store& store, const Piece& at, int64_t s) {
  return residual_row<S>(store, at.row * c.kv_heads + at.head, s);
}
// The codes of a page, where there are any.
template <class S> INLINE Ahead codes_of(const Store& store, const Piece& at, int64_t slot) {
  if (slot >= S::encoded(at.slots)) return {nullptr, 0};
  return {store.codes + int64_t(at.table[slot / PAGE]) * PAGE * S::row_bytes, PAGE * S::row_bytes};
}
INLINE float cap(float x, float softcap) { return softcap * tanhf(x / softcap); }

// N queries of one position over a piece: out (N, 2 + DIM) gets largest score, sum of weights, weighted sum of values.
// p (N, CHUNK): the weights, relative to the largest score.
template <int N>
static void attend_piece(const Cache& c, const Attend& a, const Piece& at, const float (*q)[DIM], int64_t position,
                         const float* sinks, float* p, float* out) {
  constexpr int W = LANES;
  alignas(64) int32_t mask[CHUNK_PAGES][PAGE];
  bool live[CHUNK_PAGES + 1] = {};
  Float<W> tops[N];
  for (auto& top : tops) top = splat<W>(-INFINITY);
  Keys<K, N> keys(q, c.k);
  const int64_t k_done = K::encoded(at.slots), v_done = V::encoded(at.slots);
  for (int page = 0; page < at.pages; page++) {
    float* to = p + page * PAGE;
    live[page] = readable(c, at, page, position, a.window, mask[page]);
    if (!live[page]) {
      for (int n = 0; n < N; n++) memset(to + n * CHUNK, 0, PAGE * 4);
      continue;
    }
    const int64_t slot = at.first + page * PAGE;
    const Ahead ahead = codes_of<V>(c.v, at, slot);
    if (slot < k_done) keys.scores(c.k, at.table[slot / PAGE], to, CHUNK, ahead);
    else page_dots<FloatRow<K::dtype>, N>(q, recent_rows<K>(c, c.k, at, slot), to, CHUNK, ahead);
    if (sinks && slot < c.sinks)
      for (int n = 0; n < N; n++)
        for (int t = 0; t < PAGE && slot + t < c.sinks; t++) {
          float x = 0;
          for (int d = 0; d < DIM; d++) x += q[n][d] * sinks[(slot + t) * DIM + d];
          to[n * CHUNK + t] = x;
        }
    for (int n = 0; n < N; n++)
      for (int t = 0; t < PAGE; t += W) {
        if (a.softcap)
          for (int i = t; i < t + W; i++) to[n * CHUNK + i] = cap(to[n * CHUNK + i], a.softcap);
        Float<W> x = select<W>(load<Int<W>>(mask[page] + t), load<Float<W>>(to + n * CHUNK + t), splat<W>(-INFINITY));
        tops[n] = maximum(tops[n], x);
        store(to + n * CHUNK + t, x);
      }
  }
  Values<V, N> values;
  for (int n = 0; n < N; n++) {
    float top = largest<W>(tops[n]);
    Float<W> sum = {};
    for (int page = 0; page < at.pages; page++)
      for (int t = page * PAGE; live[page] && t < page * PAGE + PAGE; t += W) {
        Float<W> x = exponential<W>(load<Float<W>>(p + n * CHUNK + t) - splat<W>(top > -INFINITY ? top : 0));
        sum = sum + x;
        store(p + n * CHUNK + t, x);
      }
    out[n * (2 + DIM)] = top;
    out[n * (2 + DIM) + 1] = total<W>(sum);
  }
  for (int n = 0; at.pages & 1 && n < N; n++) memset(p + n * CHUNK + at.pages * PAGE, 0, PAGE * 4);
  for (int page = 0; page < at.pages; page += 2) {
    int64_t pools[2] = {0, 0};
    int counts[2] = {0, 0};
    Ahead ahead[2];
    for (int i = 0; i < 2; i++) {
      ahead[i] = codes_of<K>(c.k, at, at.first + CHUNK + (page + i) * PAGE);
      if (!live[page + i]) continue;
      const int64_t slot = at.first + (page + i) * PAGE, end = slot + PAGE < at.slots ? slot + PAGE : at.slots;
      const int64_t done = v_done < slot ? slot : v_done < end ? v_done : end;
      counts[i] = int(done - slot);
      if (counts[i]) pools[i] = at.table[slot / PAGE];
      if (done < end)
        values.add_recent(p + (page + i) * PAGE + counts[i], recent_rows<V>(c, c.v, at, done), int(end - done));
    }
    if (counts[0] || counts[1]) values.add(c.v, p + page * PAGE, pools, counts, ahead);
  }
  alignas(64) float result[N][DIM];
  values.result(c.v, result);
  for (int n = 0; n < N; n++) memcpy(out + n * (2 + DIM) + 2, result[n], sizeof result[n]);
}

// One number of a key as attention reads it: decoded and rounded to the compute dtype.
static float rounded_to(int64_t dtype, float x) {
  return dtype == FLOAT32 ? x : dtype == FLOAT16 ? from_half(to_half(x)) : from_bfloat(to_bfloat(x));
}
static float decoded_key(const Cache& c, const Piece& at, int64_t slot, int d, int64_t dtype) {
  if (slot >= K::encoded(at.slots)) return number<K::dtype>(recent_rows<K>(c, c.k, at, slot), d);
  const int64_t token = int64_t(at.table[slot / PAGE]) * PAGE + slot % PAGE;
  const uint8_t* row = c.k.codes + token * K::row_bytes;
  if (K::layout == PLAIN) return number<K::dtype>(row, d);
  if (K::layout == FP8) {
    float x = Fp8Row::part<4>(splat<4>(int32_t(row[d])), 0)[0];
    return rounded_to(dtype, x * (K::token_scale ? static_cast<const float*>(c.k.scale)[token] : c.k.tensor_scale));
  }
  const int code = row[d % K::row_bytes] >> (K::bits * (d / K::row_bytes)) & ((1 << K::bits) - 1);
  const int64_t i = K::layout == TOKEN ? token : token / PAGE * DIM + d;
  const float scale = from_half(static_cast<const uint16_t*>(c.k.scale)[i]);
  return rounded_to(dtype, from_half(c.k.zero[i]) + float(code) * scale);
}
// The first keys where the cache has them: turned on by as many positions as were evicted behind them. Into pages where
// these hold them as numbers, else into out (sinks, DIM). kvsuite/kernels/rope.py: Rope.rotate.
static void rotate_sinks(const Cache& c, const Piece& at, int64_t by, int64_t dtype, float* out) {
  const int half = int(c.rotary_half), heads = int(c.kv_heads);
  for (int64_t s = 0; s < c.sinks && s < at.slots; s++) {
    float x[DIM];
    for (int d = 0; d < DIM; d++)
      x[d] = c.original_sinks ? number<K::dtype>(c.original_sinks, ((at.row * heads + at.head) * c.sinks + s) * DIM + d)
                              : decoded_key(c, at, s, d, dtype);
    for (int d = 0; d < half; d++) {
      const float angle = float(by) * c.inverse_frequency[d], cosine = cosf(angle), sine = sinf(angle), a = x[d], b = x[d + half];
      x[d] = a * cosine - b * sine, x[d + half] = b * cosine + a * sine;
    }
    for (int d = 0; d < DIM; d++) {
      if (c.original_sinks) put<K::dtype>(c.k.codes, (int64_t(at.table[s / PAGE]) * PAGE + s % PAGE) * DIM + d, x[d]);
      else out[s * DIM + d] = d < 2 * half ? rounded_to(dtype, x[d]) : x[d];
    }
  }
}

struct Job {
  const Cache& c;
  const Attend& a;
  int64_t chunks, run;           // of the longest (sequence, kv head); chunks that a thread takes one after another
  std::atomic<int64_t> next;
  std::atomic<int32_t>* finished;  // (items, kv_heads): chunks that are done
  float *partial, *weights;      // (items, kv_heads, chunks, queries, GROUP, 2 + DIM); (…, chunks, GROUP, CHUNK) or null
};
template <int LEFT>
static void attend_group(const Job& job, const Piece& at, const float (*q)[DIM], int64_t position, const float* sinks,
                         float* p, float* out) {
  constexpr int N = LEFT <= 4 ? LEFT : LEFT / ((LEFT + 3) / 4);
  attend_piece<N>(job.c, job.a, at, q, position, sinks, p, out);
  if constexpr (LEFT > N)
    attend_group<LEFT - N>(job, at, q + N, position, sinks, job.weights ? p + N * CHUNK : p, out + N * (2 + DIM));
}
static void one_chunk(const Job& job, int64_t item, Piece at, int64_t chunk) {
  const Cache& c = job.c;
  const Attend& a = job.a;
  alignas(64) float q[GROUP][DIM], own[4 * CHUNK], sinks[PAGE * DIM];
  const int64_t index = (item * c.kv_heads + at.head) * job.chunks + chunk, gap = at.seen - c.tokens[at.row * c.kv_heads + at.head];
  const bool turned = c.sinks && gap > 0 && chunk == 0;
  if (turned) rotate_sinks(c, at, gap, a.dtype, sinks);
  for (int64_t i = 0; i < a.queries; i++) {
    for (int g = 0; g < GROUP; g++) {
      const int64_t first = item * a.q_stride[0] + (at.head * GROUP + g) * a.q_stride[1] + i * a.q_stride[2];
      for (int d = 0; d < DIM; d++) q[g][d] = number(a.q, a.dtype, first + d) * a.scale;
    }
    float* p = job.weights ? job.weights + index * GROUP * CHUNK : own;
    attend_group<GROUP>(job, at, q, at.seen - a.queries + i, turned && !c.original_sinks ? sinks : nullptr, p,
                        job.partial + (index * a.queries + i) * GROUP * (2 + DIM));
  }
}
static void merge(const Job& job, int64_t item, Piece at, int64_t chunks) {
  const Cache& c = job.c;
  const Attend& a = job.a;
  const int64_t stride = a.queries * GROUP * (2 + DIM), first = (item * c.kv_heads + at.head) * job.chunks;
  float share[GROUP];  // what a weight of 1 relative to a chunk's largest score is worth in the end, but for that score
  float tops[GROUP];
  for (int64_t i = 0; i < a.queries; i++)
    for (int g = 0; g < GROUP; g++) {
      const float* x = job.partial + first * stride + (i * GROUP + g) * (2 + DIM);
      const float sink = a.sink_logits ? a.sink_logits[at.head * GROUP + g] : -INFINITY;
      float top = sink, sum = 0, total[DIM] = {};
      for (int64_t n = 0; n < chunks; n++) top = fmaxf(top, x[n * stride]);
      if (top > -INFINITY) sum = expf(sink - top);
      for (int64_t n = 0; n < chunks; n++) {
        if (x[n * stride + 1] == 0) continue;  // nothing was read; a sum that is no number goes on
        const float w = expf(x[n * stride] - top);
        sum += w * x[n * stride + 1];
        for (int d = 0; d < DIM; d++) total[d] += w * x[n * stride + 2 + d];
      }
      const float inverse = sum > 0 ? 1 / sum : sum == sum ? 0 : sum;
      const int64_t to = item * a.out_stride[0] + (at.head * GROUP + g) * a.out_stride[1] + i * a.out_stride[2];
      for (int d = 0; d < DIM; d++) {
        const float y = total[d] * inverse;
        if (a.dtype == FLOAT32) put<FLOAT32>(a.out, to + d, y);
        else if (a.dtype == FLOAT16) put<FLOAT16>(a.out, to + d, y);
        else put<BFLOAT16>(a.out, to + d, y);
      }
      tops[g] = top, share[g] = inverse / GROUP;
    }
  if (!job.weights) return;
  for (int64_t n = 0; n < chunks; n++) {
    float factor[GROUP];
    for (int g = 0; g < GROUP; g++) {
      const float own = job.partial[(first + n) * stride + g * (2 + DIM)];
      factor[g] = own > -INFINITY ? expf(own - tops[g]) * share[g] : 0;
    }
    const float* p = job.weights + (first + n) * GROUP * CHUNK;
    for (int64_t s = n * CHUNK; s < at.slots && s < (n + 1) * CHUNK; s += PAGE) {
      const int64_t place = int64_t(at.table[s / PAGE]) * PAGE;
      const int count = int(at.slots - s < PAGE ? at.slots - s : PAGE);
      if (place == 0 && c.positions) continue;  // given back
      for (int t = 0; t < count; t++) {
        float mean = 0;
        for (int g = 0; g < GROUP; g++) mean += p[g * CHUNK + s - n * CHUNK + t] * factor[g];
        if (c.accumulated) c.accumulated[place + t] += mean;
        if (c.newest) c.newest[place + t] = mean;
      }
    }
  }
}
static Piece piece_of(const Job& job, int64_t item, int64_t head, int64_t chunk) {
  const int64_t row = job.a.rows[item], own = row * job.c.kv_heads + head, slots = job.c.slots[own], first = chunk * CHUNK;
  const int64_t left = slots - first < CHUNK ? slots - first : CHUNK;
  return {row, head, slots, job.c.seen[row], first, job.c.page_table + own * job.c.columns, left > 0 ? int((left + PAGE - 1) / PAGE) : 0};
}
static void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const int64_t heads = job.c.kv_heads, tasks = job.a.items * heads * job.chunks;
  for (int64_t i = 0, left = 0;; i++, left--) {
    if (left == 0) i = job.next.fetch_add(job.run, std::memory_order_relaxed), left = job.run;
    if (i >= tasks) break;
    const int64_t chunk = i % job.chunks, head = i / job.chunks % heads, item = i / job.chunks / heads;
    if (job.a.rows[item] < 0) continue;
    const Piece at = piece_of(job, item, head, chunk);
    if (!at.pages) continue;
    one_chunk(job, item, at, chunk);
    const int64_t chunks = (at.slots + CHUNK - 1) / CHUNK;
    if (job.finished[item * heads + head].fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) merge(job, item, at, chunks);
  }
}
struct Scratch {  // of the calling thread; grows, so that a step allocates nothing
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  void* of(size_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + bytes / 2 + 63) / 64 * 64;
      memory = aligned_alloc(64, size);
      if (!memory) abort();
    }
    return memory;
  }
};
static void attend(const Cache& c, const Attend& a, const Threads& threads) {
  static thread_local Scratch scratch;
  int64_t longest = 0, slots = 0;
  for (int64_t i = 0; i < a.items; i++)
    for (int64_t h = 0; a.rows[i] >= 0 && h < c.kv_heads; h++) {
      const int64_t own = c.slots[a.rows[i] * c.kv_heads + h];
      slots += own;
      longest = own > longest ? own : longest;
    }
  const int64_t heads = a.items * c.kv_heads, chunks = (longest + CHUNK - 1) / CHUNK;
  const size_t partial = size_t(heads * chunks * a.queries * GROUP * (2 + DIM)) * 4, p = size_t(heads * chunks * GROUP * CHUNK) * 4;
  const bool keeps = c.accumulated || c.newest;
  char* memory = static_cast<char*>(scratch.of(partial + (keeps ? p : 0) + size_t(heads) * 4 + 256));
  float* weights = reinterpret_cast<float*>(memory + (partial + 63) / 64 * 64);
  char* counters = keeps ? reinterpret_cast<char*>(weights) + p : reinterpret_cast<char*>(weights);
  const int64_t in_turn = heads * chunks / (8 * threads.count);
  Job job{c, a, chunks, in_turn < 1 ? 1 : in_turn, {0}, reinterpret_cast<std::atomic<int32_t>*>(counters), reinterpret_cast<float*>(memory), keeps ? weights : nullptr};
  for (int64_t i = 0; i < heads; i++) new (job.finished + i) std::atomic<int32_t>(0);
  if (slots * a.queries > 1024) run(work, &job, threads);
  else work(&job);  // faster than waking others
}
