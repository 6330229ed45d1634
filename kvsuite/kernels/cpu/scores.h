// Scores: the products of queries with a page of keys, as numbers or as codes.
#pragma once
#include "rows.h"

// The products of N queries with the rows of a page's tokens: q (N, columns * parts), out (N, stride).
template <class R, int N>
static void page_dots(const typename R::Operand (*q)[R::columns * R::parts], const uint8_t* rows, float* out, int stride,
                      const Ahead& ahead) {
  constexpr int W = LANES, TILES = REGISTERS == 32 ? 2 : 1, PORTIONS = PAGE / (W * TILES) * (R::columns / 4);
  for (int t = 0; t < PAGE; t += W * TILES) {
    decltype(R::template part<W>(Int<W>{}, 0)) sums[2][N] = {};  // two chains each: by tile, or by part
    for (int c = 0; c < R::columns; c += 4) {
      Ahead::fetch(ahead, t / (W * TILES) * (R::columns / 4) + c / 4, PORTIONS);
      Int<W> x[TILES][4];
      for (int s = 0; s < TILES; s++) columns<W>(rows + (t + s * W) * R::bytes + c * 4, R::bytes, x[s]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
        for (int i = 0; i < R::parts; i++)
          for (int s = 0; s < TILES; s++) {
            auto y = R::template part<W>(x[s][j], i);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
              auto& sum = sums[TILES == 2 ? s : (j * R::parts + i) & 1][n];
              sum = add_product<W>(sum, y, q[n][R::operand(c + j, i)]);
            }
          }
    }
    for (int n = 0; n < N; n++) {
      if (TILES == 2) store(out + n * stride + t + W, as_float<W>(sums[1][n]));
      store(out + n * stride + t, TILES == 2 ? as_float<W>(sums[0][n]) : as_float<W>(sums[0][n] + sums[1][n]));
    }
  }
}

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
