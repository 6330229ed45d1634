// The first tokens' keys where a cache that evicts behind them has them.
#pragma once
#include "rows.h"

// One chunk of one (sequence, kv head).
struct Piece {
  int64_t row, head, slots, seen, first;  // first: of the chunk's slots
  const int32_t* table;                   // its pages, from column 0
  int pages;                              // of the chunk, the last one perhaps partly filled
};
// A page's slots from s on, in a residual.
template <class S> INLINE const uint8_t* recent_rows(const Cache& c, const Store& store, const Piece& at, int64_t s) {
  return residual_row<S>(store, at.row * c.kv_heads + at.head, s);
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
  if (K::blocks) {
    const float scale = block_scale<K>(c.k, token * K::groups + d / K::group) * c.k.tensor_scale;
    return rounded_to(dtype, (K::layout == E2M1 ? E2M1_NUMBERS[code & 15] : float(int8_t(code))) * scale);
  }
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
