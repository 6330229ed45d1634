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

// The same, of rows whose groups of channels have scales: scale (GROUPS, PAGE). A group's products are summed before its
// scale comes in; rows of numbers have a half of their channels in the low bits of each byte, and one in the high ones.
template <class R, int N, int GROUPS>
static void block_dots(const typename R::Operand (*q)[R::columns * R::parts], const uint8_t* rows, const float (*scale)[PAGE],
                       float* out, int stride, const Ahead& ahead) {
  constexpr int W = LANES, HALVES = R::integer ? 1 : 2, STEP = R::columns * HALVES / GROUPS, PORTIONS = PAGE / W * (R::columns / 4);
  static_assert(STEP % 4 == 0, "a group is no whole columns");
  for (int t = 0; t < PAGE; t += W) {
    Float<W> sums[N] = {};
    for (int first = 0; first < R::columns; first += STEP) {
      decltype(R::template part<W>(Int<W>{}, 0)) own[HALVES][N] = {};
      for (int c = first; c < first + STEP; c += 4) {
        Ahead::fetch(ahead, t / W * (R::columns / 4) + c / 4, PORTIONS);
        Int<W> x[4];
        columns<W>(rows + t * R::bytes + c * 4, R::bytes, x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
          for (int i = 0; i < R::parts; i++) {
            auto y = R::template part<W>(x[j], i);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
              auto& sum = own[i / (R::parts / HALVES)][n];
              sum = add_product<W>(sum, y, q[n][R::operand(c + j, i)]);
            }
          }
      }
      for (int half = 0; half < HALVES; half++)
        for (int n = 0; n < N; n++)
          sums[n] = fma(as_float<W>(own[half][n]), load<Float<W>>(scale[half * (GROUPS / HALVES) + first / STEP] + t), sums[n]);
    }
    for (int n = 0; n < N; n++) store(out + n * stride + t, sums[n]);
  }
}
// A page's scales, group by group.
template <class S> static void spread_scales(const Store& store, int64_t page, float (*scale)[PAGE]) {
  for (int t = 0; t < PAGE; t++)
    for (int g = 0; g < S::groups; g++)
      scale[g][t] = block_scale<S>(store, (page * PAGE + t) * S::groups + g);
}

template <class S> static constexpr float code_limit() {  // so that no sum of products leaves 32 bits
  return DIM * ((1 << S::bits) - 1) * 32766ll < (1ll << 31) ? 32766.f : 16383.f;
}
enum { QUERY_LANES = DIM % LANES ? 4 : LANES, QUERY_VECTORS = DIM / QUERY_LANES };
// x (DIM) as 16-bit numbers in units of what is returned, in the order of CodeRow's operands.
template <class S> static float quantize_query(const Float<QUERY_LANES>* x, int32_t* operands) {
  constexpr int W = QUERY_LANES;
  Float<W> top = splat<W>(1e-30f);
  for (int i = 0; i < QUERY_VECTORS; i++) top = maximum(top, magnitude(x[i]));
  const float most = largest(top);
  const Float<W> inverse = splat<W>(code_limit<S>() / most);
  for (int i = 0; i < QUERY_VECTORS; i++)
    narrow(rounded(x[i] * inverse), reinterpret_cast<int16_t*>(operands) + i * W, true);
  return most * (1 / code_limit<S>());
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
      unit[n] = store.tensor_scale;
      if constexpr (R::integer && !by_channel) {
        Float<QUERY_LANES> x[QUERY_VECTORS], all = {};
        for (int i = 0; i < QUERY_VECTORS; i++) x[i] = load<Float<QUERY_LANES>>(q[n] + i * QUERY_LANES), all = all + x[i];
        unit[n] = quantize_query<S>(x, operands[n]);
        sum[n] = total(all);
      }
    }
  }
  void scores(const Store& store, int64_t page, float* out, int stride, const Ahead& ahead) {
    constexpr int W = LANES;
    if constexpr (by_channel) fold_scales(store, page);
    const uint8_t* rows = store.codes + page * PAGE * R::bytes;
    if constexpr (S::blocks) {
      alignas(64) float scale[S::groups][PAGE];
      spread_scales<S>(store, page, scale);
      if constexpr (R::integer) block_dots<R, N, S::groups>(operands, rows, scale, out, stride, ahead);
      else block_dots<R, N, S::groups>(q, rows, scale, out, stride, ahead);
    } else if constexpr (R::integer) page_dots<R, N>(operands, rows, out, stride, ahead);
    else page_dots<R, N>(q, rows, out, stride, ahead);
    for (int n = 0; n < N; n++)
      for (int t = 0; t < PAGE; t += W) {
        float* to = out + n * stride + t;
        Float<W> x = load<Float<W>>(to) * splat<W>(unit[n]);
        if constexpr (by_channel) x = x + splat<W>(sum[n]);
        else if constexpr (R::integer && !S::blocks) {
          const uint16_t* scale = static_cast<const uint16_t*>(store.scale) + page * PAGE + t;
          x = fma(halves<W>(store.zero + page * PAGE + t), splat<W>(sum[n]), x * halves<W>(scale));
        } else if constexpr (S::layout == LEVELS)
          x = x * halves<W>(static_cast<const uint16_t*>(store.scale) + page * PAGE + t);
        else if constexpr (S::token_scale)
          x = x * load<Float<W>>(static_cast<const float*>(store.scale) + page * PAGE + t);
        ::store(to, x);
      }
  }
  // A page's scale and zero of each channel go into the query: sum over channels of q * (code * scale + zero).
  void fold_scales(const Store& store, int64_t page) {
    constexpr int W = QUERY_LANES;
    Float<W> scale[QUERY_VECTORS], zero[QUERY_VECTORS];
    for (int i = 0; i < QUERY_VECTORS; i++) {
      scale[i] = halves<W>(static_cast<const uint16_t*>(store.scale) + page * DIM + i * W);
      zero[i] = halves<W>(store.zero + page * DIM + i * W);
    }
    for (int n = 0; n < N; n++) {
      Float<W> x[QUERY_VECTORS], zeros = {};
      for (int i = 0; i < QUERY_VECTORS; i++) {
        const Float<W> y = load<Float<W>>(q[n] + i * W);
        x[i] = y * scale[i];
        zeros = fma(y, zero[i], zeros);
      }
      unit[n] = quantize_query<S>(x, operands[n]);
      sum[n] = total(zeros);
    }
  }
};
