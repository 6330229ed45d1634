// Vectors of W 32-bit lanes: 16 with AVX-512, 8 with AVX2, else 4, which compilers map to what the machine has.
#pragma once
#include "kv.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
enum { LANES = 16, REGISTERS = 32 };
#define WIDE 512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
enum { LANES = 8, REGISTERS = 16 };
#define WIDE 256
#else
enum { LANES = 4, REGISTERS = 16 };
#define WIDE 0
#endif
#if WIDE
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef int32_t I16 __attribute__((vector_size(64)));
template <int W> struct Vector;
template <> struct Vector<4> { typedef F4 F; typedef I4 I; };
template <> struct Vector<8> { typedef F8 F; typedef I8 I; };
template <> struct Vector<16> { typedef F16 F; typedef I16 I; };
template <int W> using Float = typename Vector<W>::F;
template <int W> using Int = typename Vector<W>::I;

template <class T> INLINE T load(const void* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T> INLINE void store(void* p, T x) { memcpy(p, &x, sizeof x); }
template <int W> INLINE Int<W> splat(int32_t x) { return Int<W>{} + x; }
template <int W> INLINE Float<W> splat(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return (Float<W>)splat<W>(bits);
}
template <int W> INLINE Float<W> select(Int<W> mask, Float<W> yes, Float<W> no) {
  return (Float<W>)((mask & (Int<W>)yes) | (~mask & (Int<W>)no));
}
template <int W> INLINE Int<W> lane_numbers() {
  Int<W> x;
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}
template <int W> INLINE Float<W> permute(Float<W> x, Int<W> from) {  // lane i gets x[from[i] % W]
#ifdef __clang__
  Float<W> y;
  for (int i = 0; i < W; i++) y[i] = x[from[i] & (W - 1)];
  return y;
#else
  return __builtin_shuffle(x, from);
#endif
}

// W numbers as 16-bit ones; `pairs`: each four of them, a b c d, in the order a c b d.
INLINE void narrow(I4 x, int16_t* to, bool pairs) {
  int16_t y[4];
  for (int i = 0; i < 4; i++) y[i] = int16_t(x[pairs ? (i & 1) * 2 + (i >> 1) : i]);
  memcpy(to, y, sizeof y);
}
// dot16: c + a.low * b.low + a.high * b.high of each lane's signed 16-bit halves. The 32- and 64-bit interleavings and
// low16, high16 work within blocks of four lanes.
#if WIDE
INLINE F4 fma(F4 a, F4 b, F4 c) { return _mm_fmadd_ps(a, b, c); }
INLINE F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F4 maximum(F4 a, F4 b) { return _mm_max_ps(a, b); }
INLINE F8 maximum(F8 a, F8 b) { return _mm256_max_ps(a, b); }
INLINE F4 minimum(F4 a, F4 b) { return _mm_min_ps(a, b); }
INLINE F8 minimum(F8 a, F8 b) { return _mm256_min_ps(a, b); }
INLINE I4 rounded(F4 x) { return (I4)_mm_cvtps_epi32(x); }
INLINE I8 rounded(F8 x) { return (I8)_mm256_cvtps_epi32(x); }
INLINE F4 whole(F4 x) { return _mm_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F8 whole(F8 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F4 to_float(I4 x) { return _mm_cvtepi32_ps((__m128i)x); }
INLINE F8 to_float(I8 x) { return _mm256_cvtepi32_ps((__m256i)x); }
INLINE void halves(const void* p, F4& x) { x = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void halves(const void* p, F8& x) { x = _mm256_cvtph_ps(load<__m128i>(p)); }
#define INTERLEAVE(name, op)                                                                       \
  INLINE I4 name(I4 a, I4 b) { return (I4)_mm_unpack##op((__m128i)a, (__m128i)b); }                \
  INLINE I8 name(I8 a, I8 b) { return (I8)_mm256_unpack##op((__m256i)a, (__m256i)b); }
#define INTERLEAVE_WIDE(name, op) \
  INLINE I16 name(I16 a, I16 b) { return (I16)_mm512_unpack##op((__m512i)a, (__m512i)b); }
INTERLEAVE(low16, lo_epi16) INTERLEAVE(high16, hi_epi16) INTERLEAVE(low32, lo_epi32)
INTERLEAVE(high32, hi_epi32) INTERLEAVE(low64, lo_epi64) INTERLEAVE(high64, hi_epi64)
#if WIDE == 512
INTERLEAVE_WIDE(low16, lo_epi16) INTERLEAVE_WIDE(high16, hi_epi16) INTERLEAVE_WIDE(low32, lo_epi32)
INTERLEAVE_WIDE(high32, hi_epi32) INTERLEAVE_WIDE(low64, lo_epi64) INTERLEAVE_WIDE(high64, hi_epi64)
INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F16 maximum(F16 a, F16 b) { return _mm512_max_ps(a, b); }
INLINE F16 minimum(F16 a, F16 b) { return _mm512_min_ps(a, b); }
INLINE I16 rounded(F16 x) { return (I16)_mm512_cvtps_epi32(x); }
INLINE F16 whole(F16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F16 to_float(I16 x) { return _mm512_cvtepi32_ps((__m512i)x); }
INLINE void halves(const void* p, F16& x) { x = _mm512_cvtph_ps(load<__m256i>(p)); }
#ifdef __AVX512VBMI__
#define LOOKUP
// table[b & 127] for each byte b; table (128,), aligned.
INLINE I16 lookup(const uint8_t* table, I16 x) {
  return (I16)_mm512_permutex2var_epi8(load<__m512i>(table), (__m512i)x, load<__m512i>(table + 64));
}
INLINE I8 lookup(const uint8_t* table, I8 x) {
  return (I8)_mm512_castsi512_si256((__m512i)lookup(table, (I16)_mm512_castsi256_si512((__m256i)x)));
}
INLINE I4 lookup(const uint8_t* table, I4 x) {
  return (I4)_mm512_castsi512_si128((__m512i)lookup(table, (I16)_mm512_castsi128_si512((__m128i)x)));
}
#endif
#endif
#if defined(__AVX512VNNI__) && WIDE == 512
INLINE I4 dot16(I4 c, I4 a, I4 b) { return (I4)_mm_dpwssd_epi32((__m128i)c, (__m128i)a, (__m128i)b); }
INLINE I8 dot16(I8 c, I8 a, I8 b) { return (I8)_mm256_dpwssd_epi32((__m256i)c, (__m256i)a, (__m256i)b); }
INLINE I16 dot16(I16 c, I16 a, I16 b) { return (I16)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
#else
INLINE I4 dot16(I4 c, I4 a, I4 b) { return c + (I4)_mm_madd_epi16((__m128i)a, (__m128i)b); }
INLINE I8 dot16(I8 c, I8 a, I8 b) { return c + (I8)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#if WIDE == 512
INLINE I16 dot16(I16 c, I16 a, I16 b) { return c + (I16)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#endif
#endif
INLINE __m128i paired(__m128i x) { return _mm_shuffle_epi8(x, _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)); }
INLINE void narrow(I8 x, int16_t* to, bool pairs) {
  __m128i y = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  store(to, pairs ? paired(y) : y);
}
#if WIDE == 512
INLINE void narrow(I16 x, int16_t* to, bool pairs) {
  __m256i y = _mm512_cvtepi32_epi16((__m512i)x);
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  store(to, pairs ? _mm256_shuffle_epi8(y, _mm256_broadcastsi128_si256(order)) : y);
}
#endif
// Rows' pieces of 16 bytes: four lanes each of W tokens, so that after the interleavings lane i is token i's.
INLINE void pieces(const uint8_t* p, int64_t row, I4* x) {
  for (int i = 0; i < 4; i++) x[i] = load<I4>(p + i * row);
}
INLINE void pieces(const uint8_t* p, int64_t row, I8* x) {
  for (int i = 0; i < 4; i++)
    x[i] = (I8)_mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(p + i * row)), load<__m128i>(p + (i + 4) * row), 1);
}
#if WIDE == 512
INLINE void pieces(const uint8_t* p, int64_t row, I16* x) {
  for (int i = 0; i < 4; i++) {
    __m512i y = _mm512_castsi128_si512(load<__m128i>(p + i * row));
    y = _mm512_mask_broadcast_i32x4(y, 0x00F0, load<__m128i>(p + (i + 4) * row));  // loads, needs no shuffle
    y = _mm512_mask_broadcast_i32x4(y, 0x0F00, load<__m128i>(p + (i + 8) * row));
    x[i] = (I16)_mm512_mask_broadcast_i32x4(y, 0xF000, load<__m128i>(p + (i + 12) * row));
  }
}
#endif
#else
INLINE F4 fma(F4 a, F4 b, F4 c) { return a * b + c; }
INLINE F4 maximum(F4 a, F4 b) { return select<4>((I4)(a > b), a, b); }
INLINE F4 minimum(F4 a, F4 b) { return select<4>((I4)(a < b), a, b); }
INLINE I4 rounded(F4 x) {
  I4 y;
  for (int i = 0; i < 4; i++) y[i] = int32_t(lrintf(x[i]));
  return y;
}
INLINE F4 whole(F4 x) {
  for (int i = 0; i < 4; i++) x[i] = rintf(x[i]);
  return x;
}
INLINE F4 to_float(I4 x) {
  F4 y;
  for (int i = 0; i < 4; i++) y[i] = float(x[i]);
  return y;
}
INLINE void halves(const void* p, F4& x) {
  for (int i = 0; i < 4; i++) x[i] = from_half(static_cast<const uint16_t*>(p)[i]);
}
INLINE int32_t lower(int32_t a, int32_t b) { return int32_t((uint32_t(a) & 0xFFFF) | uint32_t(b) << 16); }
INLINE int32_t upper(int32_t a, int32_t b) { return int32_t(uint32_t(a) >> 16 | (uint32_t(b) & 0xFFFF0000)); }
INLINE I4 low16(I4 a, I4 b) {
  return I4{lower(a[0], b[0]), upper(a[0], b[0]), lower(a[1], b[1]), upper(a[1], b[1])};
}
INLINE I4 high16(I4 a, I4 b) {
  return I4{lower(a[2], b[2]), upper(a[2], b[2]), lower(a[3], b[3]), upper(a[3], b[3])};
}
INLINE I4 low32(I4 a, I4 b) { return I4{a[0], b[0], a[1], b[1]}; }
INLINE I4 high32(I4 a, I4 b) { return I4{a[2], b[2], a[3], b[3]}; }
INLINE I4 low64(I4 a, I4 b) { return I4{a[0], a[1], b[0], b[1]}; }
INLINE I4 high64(I4 a, I4 b) { return I4{a[2], a[3], b[2], b[3]}; }
INLINE I4 dot16(I4 c, I4 a, I4 b) { return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
INLINE void pieces(const uint8_t* p, int64_t row, I4* x) {
  for (int i = 0; i < 4; i++) x[i] = load<I4>(p + i * row);
}
#endif

// Four 32-bit columns of W rows that are `row` bytes apart, a row in each lane.
template <int W> INLINE void columns(const uint8_t* p, int64_t row, Int<W>* x) {
  Int<W> r[4];
  pieces(p, row, r);
  Int<W> a = low32(r[0], r[1]), b = high32(r[0], r[1]), c = low32(r[2], r[3]), d = high32(r[2], r[3]);
  x[0] = low64(a, c), x[1] = high64(a, c), x[2] = low64(b, d), x[3] = high64(b, d);
}
template <int W> INLINE Float<W> halves(const uint16_t* p) {
  Float<W> x;
  halves(p, x);
  return x;
}
template <class F> INLINE F magnitude(F x) {
  typedef decltype(x < x) I;
  return (F)((I)x & 0x7FFFFFFF);
}
// Over all lanes, in a fixed order: the halves of a vector first, as the narrower is as quick.
INLINE float largest(F4 x) {
  for (int s = 2; s; s /= 2) x = maximum(x, permute<4>(x, lane_numbers<4>() ^ s));
  return x[0];
}
INLINE float total(F4 x) {
  for (int s = 2; s; s /= 2) x = x + permute<4>(x, lane_numbers<4>() ^ s);
  return x[0];
}
#if WIDE
INLINE F4 high_half(F8 x) { return _mm256_extractf128_ps(x, 1); }
INLINE F4 low_half(F8 x) { return _mm256_castps256_ps128(x); }
INLINE float largest(F8 x) { return largest(maximum(low_half(x), high_half(x))); }
INLINE float total(F8 x) { return total(low_half(x) + high_half(x)); }
#endif
#if WIDE == 512
INLINE F8 high_half(F16 x) { return _mm512_extractf32x8_ps(x, 1); }
INLINE F8 low_half(F16 x) { return _mm512_castps512_ps256(x); }
INLINE float largest(F16 x) { return largest(maximum(low_half(x), high_half(x))); }
INLINE float total(F16 x) { return total(low_half(x) + high_half(x)); }
#endif
// a's and b's blocks of four lanes become those of even and those of odd place.
#if WIDE
INLINE void split_blocks(I8& a, I8& b) {
  const __m256i x = (__m256i)a, y = (__m256i)b;
  a = (I8)_mm256_permute2x128_si256(x, y, 0x20), b = (I8)_mm256_permute2x128_si256(x, y, 0x31);
}
#endif
#if WIDE == 512
INLINE void split_blocks(I16& a, I16& b) {
  const __m512i x = (__m512i)a, y = (__m512i)b;
  a = (I16)_mm512_shuffle_i32x4(x, y, 0x88), b = (I16)_mm512_shuffle_i32x4(x, y, 0xDD);
}
#endif
// BLOCKS numbers of 32 bits, each in all lanes of a block of W / BLOCKS.
template <int W, int BLOCKS> INLINE Int<W> each_in_block(const void* p) {
  if constexpr (BLOCKS == 1) return splat<W>(load<int32_t>(p));
#if WIDE
  else if constexpr (W == 8) return (I8)_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p)), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
#endif
#if WIDE == 512
  else return (I16)_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm512_castsi128_si512(load<__m128i>(p)));
#endif
}
// p * 2^n, n whole and the result no smaller than 2^-126.
INLINE F4 times_two_to(F4 p, F4 n) { return (F4)((I4)p + (rounded(n) << 23)); }
#if WIDE
INLINE F8 times_two_to(F8 p, F8 n) { return (F8)((I8)p + (rounded(n) << 23)); }
#endif
#if WIDE == 512
INLINE F16 times_two_to(F16 p, F16 n) { return _mm512_scalef_ps(p, n); }
#endif
// e^x, error below 1e-7 of it; 0 for x < -87; not a number stays that.
template <int W> INLINE Float<W> exponential(Float<W> x) {
  const Float<W> least = splat<W>(-87.f), bounded = maximum(least, x), n = whole(bounded * splat<W>(1.44269504f));
  Float<W> r = fma(n, splat<W>(-0.693359375f), bounded);
  r = fma(n, splat<W>(2.12194440e-4f), r);
  Float<W> p = splat<W>(1.3814540579915047e-3f);  // of degree 6, the least error where e^0 and its slope are 1
  p = fma(p, r, splat<W>(8.36874544620514e-3f));
  p = fma(p, r, splat<W>(4.166838899254799e-2f));
  p = fma(p, r, splat<W>(1.666652113199234e-1f));
  p = fma(p, r, splat<W>(4.999999403953552e-1f));
  p = fma(p, r, splat<W>(1.f));
  p = fma(p, r, splat<W>(1.f));
  return x < least ? Float<W>{} : times_two_to(p, n);
}
