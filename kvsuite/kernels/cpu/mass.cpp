// The attention that each of a prompt's keys gets from its queries, without holding the attention matrix: rows of a few
// queries over all keys at a time. kvsuite/kernels/reference/mass.py: column_mass.
#define HEAD_DIM 64
#define GROUP 1
#include <atomic>
#include <initializer_list>
#include <stdlib.h>
#include "simd.h"

enum { ROWS = REGISTERS == 32 ? 8 : 4, PANEL = 2 * LANES };  // queries and keys whose products stay in registers

struct Mass {
  const void *q, *k;               // (kv_heads * group, length, dim), (kv_heads, length, dim) of `dtype`
  int64_t q_stride[2], k_stride[2];
  int64_t dtype, kv_heads, group, length, dim, first;  // first: of the queries that are counted
  float scale, softcap;            // softcap 0: none
  int64_t window, parts;           // window 0: none; parts: of a kv head's queries, each with sums of its own
  const float* sink_logits;        // (kv_heads * group,) or null
  float* panels;                   // scratch: (kv_heads, padded / PANEL, dim, PANEL) keys, a key in each lane
  float* sums;                     // scratch: (kv_heads, parts, padded)
  float* out;                      // (kv_heads, length)
};
struct Job {
  const Mass& m;
  int64_t padded;
  std::atomic<int64_t> next;
};
static void pack(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const Mass& m = job.m;
  const int64_t panels = job.padded / PANEL;
  for (int64_t i; (i = job.next.fetch_add(1)) < m.kv_heads * panels;)
    for (int64_t t = 0; t < PANEL; t++) {
      const int64_t head = i / panels, key = i % panels * PANEL + t;
      for (int64_t d = 0; d < m.dim; d++)
        m.panels[(i * m.dim + d) * PANEL + t] = key < m.length ? number(m.k, m.dtype, head * m.k_stride[0] + key * m.k_stride[1] + d) : 0;
    }
}
// Scores of ROWS queries (dim, ROWS) with a panel's keys into out (ROWS, stride).
static void scores(const float* q, const float* panel, int64_t dim, float* out, int64_t stride) {
  Float<LANES> sums[ROWS][2] = {};
  for (int64_t d = 0; d < dim; d++) {
    Float<LANES> a = load<Float<LANES>>(panel + d * PANEL), b = load<Float<LANES>>(panel + d * PANEL + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      Float<LANES> x = splat<LANES>(q[d * ROWS + r]);
      sums[r][0] = fma(a, x, sums[r][0]), sums[r][1] = fma(b, x, sums[r][1]);
    }
  }
  for (int r = 0; r < ROWS; r++) store(out + r * stride, sums[r][0]), store(out + r * stride + LANES, sums[r][1]);
}
// One row of scores, from key `start` on: the weights of the keys that query `position` reads, and 1 / their sum.
static float weights(const Mass& m, float* row, int64_t start, int64_t count, int64_t position, float sink) {
  constexpr int W = LANES;
  Float<W> tops = splat<W>(-INFINITY), total_ = {};
  const int64_t oldest = m.window && position >= m.window ? position - m.window + 1 : 0;
  Int<W> lowest = splat<W>(int32_t(oldest)), highest = splat<W>(int32_t(position));
  for (int64_t t = 0; t < count; t += W) {
    if (m.softcap)
      for (int64_t i = t; i < t + W; i++) row[i] = m.softcap * tanhf(row[i] / m.softcap);
    Int<W> key = lane_numbers<W>() + int32_t(start + t);
    Float<W> x = select<W>((Int<W>)(key >= lowest) & (Int<W>)(key <= highest), load<Float<W>>(row + t), splat<W>(-INFINITY));
    tops = maximum(tops, x);
    store(row + t, x);
  }
  float top = largest(tops);
  top = top > sink ? top : sink;
  for (int64_t t = 0; t < count; t += W) {
    Float<W> x = exponential<W>(load<Float<W>>(row + t) - splat<W>(top));
    total_ = total_ + x;
    store(row + t, x);
  }
  return 1 / (total(total_) + expf(sink - top));
}
// One part of a kv head's queries. Parts are equally many queries, so that the last ones, which have most keys, are taken
// first.
static void add_part(const Job& job, int64_t head, int64_t part, float* strip, float* q) {
  const Mass& m = job.m;
  constexpr int W = LANES;
  float* sums = m.sums + (head * m.parts + part) * job.padded;
  memset(sums, 0, size_t(job.padded) * 4);
  const int64_t blocks = (m.length - m.first + ROWS - 1) / ROWS;
  for (int64_t block = part; block < blocks; block += m.parts)
    for (int64_t g = 0; g < m.group; g++) {
      const int64_t at = m.first + block * ROWS, count = m.length - at < ROWS ? m.length - at : ROWS, own = head * m.group + g;
      for (int64_t r = 0; r < ROWS; r++)
        for (int64_t d = 0; d < m.dim; d++)
          q[d * ROWS + r] = r < count ? number(m.q, m.dtype, own * m.q_stride[0] + (at + r) * m.q_stride[1] + d) * m.scale : 0;
      const int64_t start = (m.window && at >= m.window ? at - m.window + 1 : 0) / PANEL * PANEL;
      const int64_t end = (at + count + PANEL - 1) / PANEL * PANEL, keys = end - start;
      for (int64_t t = start; t < end; t += PANEL)
        scores(q, m.panels + (head * job.padded + t) * m.dim, m.dim, strip + t - start, keys);
      for (int64_t r = 0; r < count; r++) {
        const float inverse = weights(m, strip + r * keys, start, keys, at + r, m.sink_logits ? m.sink_logits[own] : -INFINITY);
        for (int64_t t = 0; t < keys; t += W)
          store(sums + start + t, fma(load<Float<W>>(strip + r * keys + t), splat<W>(inverse), load<Float<W>>(sums + start + t)));
      }
    }
}
static void add(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const Mass& m = job.m;
  float* strip = static_cast<float*>(aligned_alloc(64, (size_t(ROWS) * (job.padded + m.dim) * 4 + 63) / 64 * 64));
  if (!strip) abort();
  for (int64_t i; (i = job.next.fetch_add(1)) < m.kv_heads * m.parts;)
    add_part(job, i / m.parts, i % m.parts, strip, strip + ROWS * job.padded);
  free(strip);
}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t panel_size() { return PANEL; }
EXPORT void column_mass(const Mass* m, const Threads* t) {
  const int64_t padded = (m->length + PANEL - 1) / PANEL * PANEL;
  for (auto work : {pack, add}) {
    Job job{*m, padded, {0}};
    run(work, &job, *t);
  }
  for (int64_t head = 0; head < m->kv_heads; head++)
    for (int64_t key = 0; key < m->length; key++) {
      float sum = 0;
      for (int64_t part = 0; part < m->parts; part++) sum += m->sums[(head * m->parts + part) * padded + key];
      m->out[head * m->length + key] = sum / float(m->group);
    }
}
