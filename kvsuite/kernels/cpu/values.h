// Weighted sums of a chunk's values, as numbers or as codes.
#pragma once
#include "rows.h"

enum { CHUNK_PAGES = 16, CHUNK = CHUNK_PAGES * PAGE, BLOCK = 2 * PAGE };

// The widest vector of 4, 8 or 16 columns, no more than `most`, that divides a row.
static constexpr int width(int columns, int most) {
  return columns % 16 == 0 && most >= 16 ? 16 : columns % 8 == 0 && most >= 8 ? 8 : 4;
}
// How many of a row's parts are summed at once, so that the sums of N queries stay in registers.
static constexpr int at_once(int parts, int n) {
  return parts * n <= REGISTERS / 2 || parts == 1 ? parts : at_once(parts / 2, n);
}

// Weighted sums of rows of numbers: p (N, stride) weights of `count` tokens; sums (N, columns * parts) grow. With BLOCKS
// scale (count, 2, columns) multiplies a column's numbers, those in the low bits of its bytes and those in the high ones.
template <class R, int N, bool BLOCKS = false>
static void add_rows(const float* p, int stride, const uint8_t* rows, int count, float (*sums)[DIM], const Ahead& ahead,
                     const float* scale = nullptr) {
  constexpr int W = width(R::columns, LANES), ONCE = at_once(R::parts, N);
  for (int c = 0; c < R::columns; c += W)
    for (int first = 0; first < R::parts; first += ONCE) {
      Float<W> sum[N][ONCE];
      for (int n = 0; n < N; n++)
        for (int i = 0; i < ONCE; i++) sum[n][i] = load<Float<W>>(&sums[n][c * R::parts + (first + i) * W]);
      for (int t = 0; t < count; t++) {
        if (c == 0 && first == 0) Ahead::fetch(ahead, t, PAGE);
        Int<W> x = load<Int<W>>(rows + t * R::bytes + c * 4);
#pragma GCC unroll 4
        for (int i = 0; i < ONCE; i++) {
          Float<W> y = R::template part<W>(x, first + i);
          if constexpr (BLOCKS) y = y * load<Float<W>>(scale + (t * 2 + (first + i) / 4) * R::columns + c);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sum[n][i] = add_product<W>(sum[n][i], y, p[n * stride + t]);
        }
      }
      for (int n = 0; n < N; n++)
        for (int i = 0; i < ONCE; i++) store(&sums[n][c * R::parts + (first + i) * W], sum[n][i]);
    }
}
// The channel of each of those sums.
template <class R> static constexpr int channel_of_sum(int at) {
  constexpr int W = width(R::columns, LANES);
  int c = at / (W * R::parts) * W, i = at / W % R::parts, l = at % W;
  return R::operand(c + l, i);
}

// No wider than what divides a group, whose codes one scale is for.
template <class R, int GROUPS> static constexpr int code_width() {
  const int columns = DIM / GROUPS / 4, most = columns & -columns;
  return width(R::columns, GROUPS > 1 && most < LANES ? most : LANES);
}
// How many pairs of tokens a vector holds: rows of 16 bytes would fill a part of it.
template <class R> static constexpr int pairs_in_vector() { return R::columns == 4 ? LANES / 4 : 1; }
template <class R, int GROUPS> static constexpr int sum_width() {
  return pairs_in_vector<R>() > 1 ? int(LANES) : code_width<R, GROUPS>();
}
// Weighted sums of rows of codes, of up to two pages: weights (N, GROUPS, 2 * PAGE) as 16-bit numbers, in units of
// unit (N, GROUPS), 0 from counts on. sums (N, DIM * pairs_in_vector) grow.
template <class R, int N, int GROUPS, int SUMS>
static void add_codes(const int16_t (*weights)[GROUPS][2 * PAGE], const float (*unit)[GROUPS], const uint8_t* const* pages,
                      const int* counts, float (*sums)[SUMS], const Ahead* ahead) {
  constexpr int PAIRS = pairs_in_vector<R>(), W = sum_width<R, GROUPS>(), COLUMNS = W / PAIRS, ONCE = at_once(R::parts, N);
  for (int c = 0; c < R::columns; c += COLUMNS)
    for (int half = 0; half < 2; half++)
      for (int first = 0; first < R::parts; first += ONCE) {
        Int<W> sum[N][ONCE] = {};
        int group[ONCE];
        for (int i = 0; i < ONCE; i++) group[i] = R::channel(c * 4, first + i) / (DIM / GROUPS);
        for (int page = 0; page < 2; page++)
          for (int t = 0; t < counts[page]; t += 2 * PAIRS) {
            if (c == 0 && half == 0 && first == 0) Ahead::fetch(ahead[page], t / (2 * PAIRS), PAGE / (2 * PAIRS));
            const uint8_t* row = pages[page] + t * R::bytes + c * 4;
            Int<W> a = load<Int<W>>(row), b = load<Int<W>>(row + (PAIRS > 1 ? W * 4 : R::bytes));
            if constexpr (PAIRS > 1) split_blocks(a, b);
            const Int<W> x = half ? high16(a, b) : low16(a, b);
#pragma GCC unroll 8
            for (int i = 0; i < ONCE; i++) {
              Int<W> y = R::template part<W>(x, first + i);
#pragma GCC unroll 4
              for (int n = 0; n < N; n++)
                sum[n][i] = dot16(sum[n][i], y, each_in_block<W, PAIRS>(&weights[n][group[i]][page * PAGE + t]));
            }
          }
        for (int n = 0; n < N; n++)
          for (int i = 0; i < ONCE; i++) {
            float* to = &sums[n][((c / COLUMNS * 2 + half) * R::parts + first + i) * W];
            store(to, fma(to_float(sum[n][i]), splat<W>(unit[n][group[i]]), load<Float<W>>(to)));
          }
      }
}
// The channel of each of those sums; several pairs' lie beside each other, four channels each.
template <class R, int GROUPS> static constexpr int channel_of_code_sum(int at) {
  constexpr int W = sum_width<R, GROUPS>();
  int l = at % W, i = at / W % R::parts, half = at / (W * R::parts) % 2, c = at / (2 * W * R::parts) * W;
  int block = pairs_in_vector<R>() > 1 ? 0 : l / 4;
  return R::channel(c * 4 + block * 16 + half * 8 + l % 4 * 2, i);  // high16 and low16 take blocks of 16 bytes
}

// Weighted sums of values, chunk by chunk. p: (N, CHUNK).
template <class S, int N> struct Values {
  typedef typename RowOf<S>::type R;
  typedef FloatRow<S::dtype> Recent;
  static constexpr int groups = R::integer || S::blocks ? S::groups : 1;
  static constexpr int pairs = R::integer ? pairs_in_vector<R>() : 1;
  alignas(64) float sums[N][DIM * pairs], recent[N][DIM];
  Float<LANES> zeros[N][groups];  // to be summed over all lanes
  bool has_recent = false;

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
      for (int i = 0; i < 2; i++) rows[i] = store.codes + pages[i] * PAGE * R::bytes, even[i] = (counts[i] + 2 * pairs - 1) & -(2 * pairs);
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
        const uint8_t* rows = store.codes + pages[i] * PAGE * R::bytes;
        if constexpr (S::blocks) {
          alignas(64) float scale[PAGE * 2 * R::columns];
          for (int j = 0; j < counts[i] * groups; j++)
            ::store(scale + j * 4, splat<4>(block_scale<S>(store, pages[i] * PAGE * groups + j)));
          add_rows<R, N, true>(own, stride, rows, counts[i], sums, ahead[i], scale);
        } else
          add_rows<R, N>(own, stride, rows, counts[i], sums, ahead[i]);
      }
    }
  }
  // Each token's weight times its group's scale as 16-bit numbers, in units of their largest / 32766.
  void weigh(const Store& store, const float* p, const int64_t* pages, const int* counts,
             int16_t (*weights)[groups][BLOCK], float (*unit)[groups]) {
    constexpr int W = LANES, VECTORS = BLOCK / W;
    alignas(64) uint16_t scales[groups][BLOCK], starts[groups][BLOCK];
    for (int i = 0; i < 2; i++) {
      const int64_t first = pages[i] * PAGE * groups;
      spread(static_cast<const uint16_t*>(store.scale) + first, counts[i], &scales[0][i * PAGE]);
      if constexpr (!S::blocks) spread(store.zero + first, counts[i], &starts[0][i * PAGE]);
    }
    for (int k = 0; k < groups; k++) {
      Float<W> scale[VECTORS], zero[VECTORS];
      for (int i = 0; i < VECTORS; i++) {
        scale[i] = halves<W>(&scales[k][i * W]);
        if constexpr (S::blocks) zero[i] = scale[i] * splat<W>(0.f);  // so that what is no number is not lost
        else zero[i] = halves<W>(&starts[k][i * W]);
      }
      for (int n = 0; n < N; n++) {
        Float<W> x[VECTORS], top = splat<W>(1e-30f), all = zeros[n][k];
        for (int i = 0; i < VECTORS; i++) {
          const Float<W> weight = load<Float<W>>(p + n * CHUNK + i * W);
          x[i] = weight * scale[i];
          all = fma(weight, zero[i], all);
          top = maximum(top, x[i]);
        }
        zeros[n][k] = all;
        const float most = largest(top);
        const Float<W> inverse = splat<W>(32766.f / most);
        unit[n][k] = most * (1 / 32766.f);
        for (int i = 0; i < VECTORS; i++) narrow(rounded(x[i] * inverse), &weights[n][k][i * W], false);
      }
    }
  }
  // A page's (tokens, groups) numbers as (groups, BLOCK); 0 from `count` tokens on, where any bits may be.
  static void spread(const uint16_t* from, int count, uint16_t* to) {
    for (int k = 0; k < groups; k++) {
      for (int t = 0; t < PAGE; t++) to[k * BLOCK + t] = from[t * groups + k];
      for (int t = count; t < PAGE; t++) to[k * BLOCK + t] = 0;
    }
  }
  void add_recent(const float* p, const void* rows, int count) {
    has_recent = true;
    add_rows<Recent, N>(p, CHUNK, static_cast<const uint8_t*>(rows), count, recent, {nullptr, 0});
  }
  // The channel of a result's i-th number.
  static constexpr int channel(int i) {
    if constexpr (R::integer) return channel_of_code_sum<R, groups>(i / 4 * 4 * pairs + i % 4);
    else return channel_of_sum<R>(i);
  }
  void result(const Store& store, int n, float* out) const {
    if constexpr (R::integer) {
      float zero[groups];
      for (int k = 0; k < groups; k++) zero[k] = total(zeros[n][k]);
      for (int i = 0; i < DIM; i += 4) {  // always of one group
        Float<4> x = splat<4>(zero[channel(i) / (DIM / groups)]);
        for (int pair = 0; pair < pairs; pair++) x = x + load<Float<4>>(&sums[n][(i * pairs + pair * 4)]);
        ::store(out + i, x);
      }
    } else
      for (int i = 0; i < DIM; i++) out[i] = sums[n][i] * store.tensor_scale;
    if (!has_recent) return;
    float x[DIM];
    for (int i = 0; i < DIM; i++) x[channel_of_sum<Recent>(i)] = recent[n][i];
    for (int i = 0; i < DIM; i++) out[i] += x[channel(i)];
  }
};
