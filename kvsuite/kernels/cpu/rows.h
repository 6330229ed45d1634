// How a token's row of numbers or codes becomes operands of multiply-adds: each 32-bit column of a row is split into
// `parts`, float lanes or lanes of two 16-bit codes. Queries and results are permuted to match, codes never are.
#pragma once
#include "simd.h"

template <Number N> struct FloatRow {
  static constexpr bool integer = false;
  static constexpr int bytes = DIM * (N == FLOAT32 ? 4 : 2), columns = bytes / 4, parts = N == FLOAT32 ? 1 : 2;
  typedef float Operand;
  static constexpr int operand(int column, int part) { return column * parts + part; }
  template <int W> INLINE Float<W> part(Int<W> x, int i) {
    if (N == FLOAT32) return (Float<W>)x;
    if (N == BFLOAT16) return (Float<W>)(i ? x & int32_t(0xFFFF0000) : x << 16);
    x = i ? x >> 16 : x;
    Float<W> size = (Float<W>)((x & 0x7FFF) << 13) * splat<W>(5192296858534827628530496329220096.f);  // 2^112
    const Int<W> beyond = (Int<W>)(size >= splat<W>(65536.f));  // infinite or not a number: not a number
    return (Float<W>)((Int<W>)size | (x & 0x8000) << 16 | beyond);
  }
};
struct Fp8Row {  // e4m3
  static constexpr bool integer = false;
  static constexpr int bytes = DIM, columns = bytes / 4, parts = 4;
  typedef float Operand;
  static constexpr int operand(int column, int part) { return column * parts + part; }
  template <int W> INLINE Float<W> part(Int<W> x, int i) {
    // Exponent and mantissa where float32 has them, and the difference of the biases. That makes 1.m * 2^-7 of a
    // subnormal 0.m * 2^-6, which twice the number less 2^-6 is; of normal numbers it is the larger of both.
    Int<W> size = (i < 3 ? x << (20 - 8 * i) : x >> 4) & 0x07F00000;
    Float<W> y = (Float<W>)(size + (120 << 23));
    y = minimum(y, fma(y, splat<W>(2.f), splat<W>(-0.015625f)));
    const Int<W> unknown = (Int<W>)(size == splat<W>(0x07F00000));
    return (Float<W>)((Int<W>)y | ((x << (24 - 8 * i)) & int32_t(0x80000000)) | unknown);
  }
};
template <int BITS> struct CodeRow {
  static constexpr bool integer = true;
  static constexpr int bytes = DIM * BITS / 8, columns = bytes / 4, parts = 16 / BITS, codes = 8 / BITS;
  typedef int32_t Operand;
  // A part holds the same bits of two bytes b and b + 2; a byte's `codes` lie DIM / codes channels apart (`pack`).
  static constexpr int operand(int column, int part) {
    return (part % codes * columns + column) * 2 + part / codes;
  }
  static constexpr int channel(int byte, int part) { return byte + part / codes + part % codes * bytes; }
  template <int W> INLINE Int<W> part(Int<W> x, int i) {
    return (x >> (BITS * i)) & int32_t(0x10001 * ((1 << BITS) - 1));
  }
};
template <class S> struct RowOf { typedef CodeRow<S::bits> type; };
template <int B, int G, int R, bool O, Number D, bool T> struct RowOf<Spec<PLAIN, B, G, R, O, D, T>> { typedef FloatRow<D> type; };
template <int B, int G, int R, bool O, Number D, bool T> struct RowOf<Spec<FP8, B, G, R, O, D, T>> { typedef Fp8Row type; };

// The widest vector of 4, 8 or 16 columns, no more than `most`, that divides a row.
static constexpr int width(int columns, int most) {
  return columns % 16 == 0 && most >= 16 ? 16 : columns % 8 == 0 && most >= 8 ? 8 : 4;
}
// How many of a row's parts are summed at once, so that the sums of N queries stay in registers.
static constexpr int at_once(int parts, int n) {
  return parts * n <= REGISTERS / 2 || parts == 1 ? parts : at_once(parts / 2, n);
}

template <int W> INLINE Float<W> add_product(Float<W> c, Float<W> a, float b) { return fma(a, splat<W>(b), c); }
template <int W> INLINE Int<W> add_product(Int<W> c, Int<W> a, int32_t b) { return dot16(c, a, splat<W>(b)); }
template <int W> INLINE Float<W> as_float(Float<W> x) { return x; }
template <int W> INLINE Float<W> as_float(Int<W> x) { return to_float(x); }

// Memory that is needed next: asked for in small portions between products, since many requests at once are waited for.
struct Ahead {
  const uint8_t* p;
  int bytes;
  INLINE void fetch(const Ahead& a, int portion, int portions) {
    const int lines = (a.bytes / 64 + portions - 1) / portions;
    for (int i = 0; i < lines; i++) __builtin_prefetch(a.p + (portion * lines + i) * 64, 0, 2);
  }
};
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

// Weighted sums of rows of numbers: p (N, stride) weights of `count` tokens; sums (N, columns * parts) grow.
template <class R, int N> static void add_rows(const float* p, int stride, const uint8_t* rows, int count, float (*sums)[DIM],
                                                  const Ahead& ahead) {
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
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sum[n][i] = add_product<W>(sum[n][i], y, p[n * stride + t]);
        }
      }
      for (int n = 0; n < N; n++)
        for (int i = 0; i < ONCE; i++) store(&sums[n][c * R::parts + (first + i) * W], sum[n][i]);
    }
}
// The channel of each of those sums.
template <class R> INLINE int channel_of_sum(int at) {
  constexpr int W = width(R::columns, LANES);
  int c = at / (W * R::parts) * W, i = at / W % R::parts, l = at % W;
  return (c + l) * R::parts + i;
}

// No wider than what divides a group, whose codes one scale is for.
template <class R, int GROUPS> static constexpr int code_width() {
  const int columns = DIM / GROUPS / 4, most = columns & -columns;
  return width(R::columns, GROUPS > 1 && most < LANES ? most : LANES);
}
// Weighted sums of rows of codes, of up to two pages: weights (N, GROUPS, 2 * PAGE) as 16-bit numbers, in units of
// unit (N, GROUPS); even counts. sums (N, DIM) grow.
template <class R, int N, int GROUPS>
static void add_codes(const int16_t (*weights)[GROUPS][2 * PAGE], const float (*unit)[GROUPS], const uint8_t* const* pages,
                      const int* counts, float (*sums)[DIM], const Ahead* ahead) {
  constexpr int W = code_width<R, GROUPS>(), ONCE = at_once(R::parts, N);
  for (int c = 0; c < R::columns; c += W)
    for (int half = 0; half < 2; half++)
      for (int first = 0; first < R::parts; first += ONCE) {
        Int<W> sum[N][ONCE] = {};
        int group[ONCE];
        for (int i = 0; i < ONCE; i++) group[i] = R::channel(c * 4, first + i) / (DIM / GROUPS);
        for (int page = 0; page < 2; page++)
          for (int t = 0; t < counts[page]; t += 2) {
            if (c == 0 && half == 0 && first == 0) Ahead::fetch(ahead[page], t / 2, PAGE / 2);
            const uint8_t* row = pages[page] + t * R::bytes + c * 4;
            Int<W> a = load<Int<W>>(row), b = load<Int<W>>(row + R::bytes), x = half ? high16(a, b) : low16(a, b);
#pragma GCC unroll 8
            for (int i = 0; i < ONCE; i++) {
              Int<W> y = R::template part<W>(x, first + i);
#pragma GCC unroll 4
              for (int n = 0; n < N; n++)
                sum[n][i] = add_product<W>(sum[n][i], y, load<int32_t>(&weights[n][group[i]][page * PAGE + t]));
            }
          }
        for (int n = 0; n < N; n++)
          for (int i = 0; i < ONCE; i++) {
            float* to = &sums[n][((c / W * 2 + half) * R::parts + first + i) * W];
            store(to, fma(to_float(sum[n][i]), splat<W>(unit[n][group[i]]), load<Float<W>>(to)));
          }
      }
}
template <class R, int GROUPS> INLINE int channel_of_code_sum(int at) {
  constexpr int W = code_width<R, GROUPS>();
  int l = at % W, i = at / W % R::parts, half = at / (W * R::parts) % 2, c = at / (2 * W * R::parts) * W;
  return R::channel(c * 4 + l / 4 * 16 + half * 8 + l % 4 * 2, i);  // high16 and low16 take blocks of 16 bytes
}
