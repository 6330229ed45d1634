// How a token's row of numbers or codes becomes operands of multiply-adds: each 32-bit column of a row is split into
// `parts`, float lanes or lanes of two 16-bit codes. Queries and results are permuted to match, codes never are.
#pragma once
#include <type_traits>

#include "levels.h"
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
// The two bytes of each e4m3 number's size in bfloat16.
struct E4m3Sizes {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr E4m3Sizes() {
    for (int code = 0; code < 128; code++) {
      const bool normal = code > 7;
      int exponent = normal ? code >> 3 : 1, mantissa = normal ? 8 + code % 8 : code;
      for (; mantissa > 0 && mantissa < 8; mantissa *= 2) exponent--;
      const int bits = code == 127 ? 0x7FC0 : mantissa ? (exponent + 120) << 7 | (mantissa & 7) << 4 : 0;
      high[code] = uint8_t(bits >> 8), low[code] = uint8_t(bits);
    }
  }
};
static constexpr E4m3Sizes E4M3;
struct Fp8Row {  // e4m3
  static constexpr bool integer = false;
  static constexpr int bytes = DIM, columns = bytes / 4, parts = 4;
  typedef float Operand;
  static constexpr int operand(int column, int part) { return column * parts + part; }
  template <int W> INLINE Float<W> part(Int<W> x, int i) {
#ifdef LOOKUP
    const Int<W> high = lookup(E4M3.high, x) | (x & int32_t(0x80808080)), low = lookup(E4M3.low, x);
    const Int<W> pair = i & 1 ? (high & int32_t(0xFF00FF00)) | (low >> 8 & 0x00FF00FF)
                              : (high << 8 & int32_t(0xFF00FF00)) | (low & 0x00FF00FF);
    return FloatRow<BFLOAT16>::part<W>(pair, i / 2);
#else
    // Exponent and mantissa where float32 has them, and the difference of the biases. That makes 1.m * 2^-7 of a
    // subnormal 0.m * 2^-6, which twice the number less 2^-6 is; of normal numbers it is the larger of both.
    Int<W> size = (i < 3 ? x << (20 - 8 * i) : x >> 4) & 0x07F00000;
    Float<W> y = (Float<W>)(size + (120 << 23));
    y = minimum(y, fma(y, splat<W>(2.f), splat<W>(-0.015625f)));
    const Int<W> unknown = (Int<W>)(size == splat<W>(0x07F00000));
    return (Float<W>)((Int<W>)y | ((x << (24 - 8 * i)) & int32_t(0x80000000)) | unknown);
#endif
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
    typedef uint16_t Words __attribute__((vector_size(4 * W)));
    if (i == parts - 1) return (Int<W>)((Words)x >> (16 - BITS));  // no other bits are left
    return (x >> (BITS * i)) & int32_t(0x10001 * ((1 << BITS) - 1));
  }
};
struct SignedRow : CodeRow<8> {  // int8
  template <int W> INLINE Int<W> part(Int<W> x, int i) {
    typedef int16_t Words __attribute__((vector_size(4 * W)));
    return (Int<W>)((i ? (Words)x : (Words)x << 8) >> 8);
  }
};
INLINE F4 level(const float* table, I4 code) { return F4{table[code[0]], table[code[1]], table[code[2]], table[code[3]]}; }
#if WIDE
INLINE F8 level(const float* table, I8 code) {
  return select<8>(code << 28 >> 31, permute<8>(load<F8>(table + 8), code), permute<8>(load<F8>(table), code));
}
#endif
#if WIDE == 512
INLINE F16 level(const float* table, I16 code) { return permute<16>(load<F16>(table), code); }
#endif
template <const float* TABLE> struct LevelRow {  // codes of 4 bits, packed as those of CodeRow, as the numbers that they stand for
  static constexpr bool integer = false;
  static constexpr int bytes = DIM / 2, columns = bytes / 4, parts = 8;
  typedef float Operand;
  static constexpr int operand(int column, int part) { return column * 4 + part % 4 + part / 4 * bytes; }
  template <int W> INLINE Float<W> part(Int<W> x, int i) { return level(TABLE, x >> (i % 4 * 8 + i / 4 * 4) & 15); }
};
template <class S> struct RowOf {
  template <Layout L, class Row, class Else> using If = std::conditional_t<S::layout == L, Row, Else>;
  typedef If<LEVELS, LevelRow<LEVELS_4>, If<E2M1, LevelRow<E2M1_NUMBERS>, If<SYMMETRIC, SignedRow, CodeRow<S::bits>>>> Packed;
  typedef If<PLAIN, FloatRow<S::dtype>, If<FP8, Fp8Row, Packed>> type;
};

// A group's scale, with `blocks`.
template <class S> INLINE float block_scale(const Store& store, int64_t at) {
  if (S::layout == SYMMETRIC) return from_half(static_cast<const uint16_t*>(store.scale)[at]);
  const int size = static_cast<const uint8_t*>(store.scale)[at] & 127;  // a scale has no sign
  return from_bfloat(uint16_t(E4M3.high[size] << 8 | E4M3.low[size]));
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
