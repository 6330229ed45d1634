// Decode attention over a layer's cache. Each (sequence, kv head) is cut into chunks of fixed size that threads take by
// a counter; whoever finishes a (sequence, kv head) merges its chunks in order, so that no result depends on who did
// what, on other sequences or on the number of threads.
#pragma once
#include <atomic>
#include <new>
#include <stdlib.h>
#include "scores.h"
#include "sinks.h"
#include "values.h"

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

enum Reads { NONE, SOME, ALL };  // of a page's slots
// Which slots of a page a query at `position` reads. For SOME, `mask` has all lanes set where it does.
static Reads readable(const Cache& c, const Piece& at, int page, int64_t position, int64_t window, int32_t* mask) {
  constexpr int W = LANES;
  const int64_t first = at.first + page * PAGE, oldest = window && position >= window ? position - window + 1 : 0;
  if (!c.positions && first >= oldest && first + PAGE <= at.slots && first + PAGE <= position + 1) return ALL;
  Int<W> any = {}, lowest = splat<W>(int32_t(oldest)), highest = splat<W>(int32_t(position));
  for (int t = 0; t < PAGE; t += W) {
    Int<W> slot = lane_numbers<W>() + int32_t(first + t), where = slot;
    if (c.positions) where = load<Int<W>>(c.positions + int64_t(at.table[first / PAGE]) * PAGE + t);
    Int<W> yes = (Int<W>)(where >= lowest) & (Int<W>)(where <= highest) & (Int<W>)(slot < int32_t(at.slots));
    any |= yes;
    store(mask + t, yes);
  }
  for (int i = 0; i < W; i++)
    if (any[i]) return SOME;
  return NONE;
}
// The codes of a page, where there are any; scales are few and asked for at once.
template <class S> INLINE Ahead codes_of(const Store& store, const Piece& at, int64_t slot) {
  if (slot >= S::encoded(at.slots)) return {nullptr, 0};
  constexpr int numbers = S::layout == TOKEN || S::blocks ? PAGE * S::groups : S::layout == CHANNEL ? DIM : 0;
  constexpr int scales = numbers * (S::layout == E2M1 ? 1 : 2);  // bytes
  const int64_t page = at.table[slot / PAGE];
  for (int i = 0; i < scales; i += 64) {
    __builtin_prefetch(static_cast<const uint8_t*>(store.scale) + page * scales + i, 0, 2);
    if constexpr (!S::blocks) __builtin_prefetch(reinterpret_cast<const uint8_t*>(store.zero) + page * scales + i, 0, 2);
  }
  return {store.codes + page * PAGE * S::row_bytes, PAGE * S::row_bytes};
}
INLINE float cap(float x, float softcap) { return softcap * tanhf(x / softcap); }

// Scores p (N, CHUNK) of N queries of one position with a page's keys, -inf in slots that are not read; `tops` grow to
// the largest.
template <int N>
static Reads score_page(const Cache& c, const Attend& a, const Piece& at, Keys<K, N>& keys, int page, int64_t position,
                        const float* sinks, float* p, Float<LANES>* tops) {
  constexpr int W = LANES;
  alignas(64) int32_t mask[PAGE];
  const Reads reads = readable(c, at, page, position, a.window, mask);
  if (reads == NONE) {
    for (int n = 0; n < N; n++) memset(p + n * CHUNK, 0, PAGE * 4);
    return NONE;
  }
  const int64_t slot = at.first + page * PAGE;
  const Ahead ahead = codes_of<V>(c.v, at, slot);
  if (slot < K::encoded(at.slots)) keys.scores(c.k, at.table[slot / PAGE], p, CHUNK, ahead);
  else page_dots<FloatRow<K::dtype>, N>(keys.q, recent_rows<K>(c, c.k, at, slot), p, CHUNK, ahead);
  if (sinks && slot < c.sinks)
    for (int n = 0; n < N; n++)
      for (int t = 0; t < PAGE && slot + t < c.sinks; t++) {
        float x = 0;
        for (int d = 0; d < DIM; d++) x += keys.q[n][d] * sinks[(slot + t) * DIM + d];
        p[n * CHUNK + t] = x;
      }
  for (int n = 0; n < N; n++)
    for (int t = 0; t < PAGE; t += W) {
      float* to = p + n * CHUNK + t;
      if (a.softcap)
        for (int i = 0; i < W; i++) to[i] = cap(to[i], a.softcap);
      Float<W> x = load<Float<W>>(to);
      if (reads == SOME) {
        x = select<W>(load<Int<W>>(mask + t), x, splat<W>(-INFINITY));
        store(to, x);
      }
      tops[n] = maximum(tops[n], x);
    }
  return reads;
}
// Scores become weights relative to the largest; out (N, 2 + DIM) gets that score and the sum of weights.
template <int N> static void softmax(const Reads* reads, int pages, const Float<LANES>* tops, float* p, float* out) {
  constexpr int W = LANES;
  Float<W> top[N], sum[N] = {};
  for (int n = 0; n < N; n++) {
    const float most = out[n * (2 + DIM)] = largest(tops[n]);
    top[n] = splat<W>(most > -INFINITY ? most : 0);
  }
  for (int page = 0; page < pages; page++) {
    if (reads[page] == NONE) continue;
    for (int n = 0; n < N; n++)
      for (int t = 0; t < PAGE; t += W) {
        float* to = p + n * CHUNK + page * PAGE + t;
        const Float<W> x = exponential<W>(load<Float<W>>(to) - top[n]);
        sum[n] = sum[n] + x;
        store(to, x);
      }
  }
  for (int n = 0; n < N; n++) out[n * (2 + DIM) + 1] = total(sum[n]);
}
// Values of a pair of pages, times their weights p (N, CHUNK).
template <int N>
static void add_pages(const Cache& c, const Piece& at, Values<V, N>& values, int page, const Reads* reads, const float* p) {
  const int64_t encoded = V::encoded(at.slots);
  int64_t pools[2] = {0, 0};
  int counts[2] = {0, 0};
  Ahead ahead[2];
  for (int i = 0; i < 2; i++) {
    ahead[i] = codes_of<K>(c.k, at, at.first + CHUNK + (page + i) * PAGE);
    if (reads[i] == NONE) continue;
    const int64_t slot = at.first + (page + i) * PAGE, end = slot + PAGE < at.slots ? slot + PAGE : at.slots;
    const int64_t done = encoded < slot ? slot : encoded < end ? encoded : end;
    counts[i] = int(done - slot);
    if (counts[i]) pools[i] = at.table[slot / PAGE];
    if (done < end)
      values.add_recent(p + i * PAGE + counts[i], recent_rows<V>(c, c.v, at, done), int(end - done));
  }
  if (counts[0] || counts[1]) values.add(c.v, p, pools, counts, ahead);
}
// N queries of one position over a piece: out (N, 2 + DIM) gets largest score, sum of weights, weighted sum of
// values in the order of `Values.channel`. p (N, CHUNK): the weights, relative to the largest score.
template <int N>
static void attend_piece(const Cache& c, const Attend& a, const Piece& at, const float (*q)[DIM], int64_t position,
                         const float* sinks, float* p, float* out) {
  Reads reads[CHUNK_PAGES + 1] = {};
  Float<LANES> tops[N];
  for (auto& top : tops) top = splat<LANES>(-INFINITY);
  Keys<K, N> keys(q, c.k);
  for (int page = 0; page < at.pages; page++)
    reads[page] = score_page<N>(c, a, at, keys, page, position, sinks, p + page * PAGE, tops);
  softmax<N>(reads, at.pages, tops, p, out);
  for (int n = 0; at.pages & 1 && n < N; n++) memset(p + n * CHUNK + at.pages * PAGE, 0, PAGE * 4);
  Values<V, N> values;
  for (int page = 0; page < at.pages; page += 2) add_pages<N>(c, at, values, page, reads + page, p + page * PAGE);
  for (int n = 0; n < N; n++) values.result(c.v, n, out + n * (2 + DIM) + 2);
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
      if constexpr (K::rotated) hadamard(q[g]);
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
      float own[DIM];
      for (int d = 0; d < DIM; d++) own[Values<V, 1>::channel(d)] = total[d] * inverse;
      if constexpr (V::rotated) hadamard(own);
      for (int d = 0; d < DIM; d++) {
        const float y = own[d];
        const int64_t place = to + d;
        if (a.dtype == FLOAT32) put<FLOAT32>(a.out, place, y);
        else if (a.dtype == FLOAT16) put<FLOAT16>(a.out, place, y);
        else put<BFLOAT16>(a.out, place, y);
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
