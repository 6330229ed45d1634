// A layer's cache as C++ sees it. One library is compiled for one pair of K and V formats, head dimension and query
// group, which are macros; Python gives the rest in the structures below. See kvsuite/kernels/paged.py: PagedKV.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

enum Layout { PLAIN, TOKEN, CHANNEL, FP8, LEVELS, SYMMETRIC, E2M1 };  // kvsuite/kernels/quantspec.py: QuantSpec.layout
enum Number { FLOAT32, FLOAT16, BFLOAT16 };     // torch dtypes
enum { PAGE = 32, DIM = HEAD_DIM, QUERY_GROUP = GROUP };

template <Layout L, int BITS_, int GROUP_, int RESIDUAL_, bool ROLLING_, Number DTYPE_, bool TOKEN_SCALE_, bool ROTATED_,
          bool CHOOSES_>
struct Spec {
  static constexpr Layout layout = L;
  static constexpr int bits = BITS_;         // of one code: TOKEN and CHANNEL 2, 4 or 8; LEVELS and E2M1 4
  static constexpr int group = GROUP_;       // CHANNEL: tokens that share a scale; else channels that do
  static constexpr int residual = RESIDUAL_; // newest tokens that are kept as they are, slot s at s % residual
  static constexpr bool rolling = ROLLING_;  // the oldest leaves the residual one by one; else all of it is encoded
  static constexpr Number dtype = DTYPE_;    // PLAIN: of pages; of the residual; what is encoded
  static constexpr bool token_scale = TOKEN_SCALE_;  // FP8: a scale per token
  static constexpr bool rotated = ROTATED_;  // what is encoded was turned by `hadamard`
  static constexpr bool chooses = CHOOSES_;  // E2M1: the largest number of a group is 4 or 6, not always 6
  static constexpr int number_bytes = DTYPE_ == FLOAT32 ? 4 : 2;
  static constexpr int row_bytes = L == PLAIN ? DIM * number_bytes : L == FP8 ? DIM : DIM * BITS_ / 8;  // of a token
  static constexpr bool blocks = L == SYMMETRIC || L == E2M1;  // a scale, but no zero, for each group of a token's channels
  static constexpr int groups = L == TOKEN || blocks ? DIM / GROUP_ : 1;  // scales per token
  static int64_t encoded(int64_t slots) {  // QuantSpec.num_encoded
    if (residual == 0) return slots;
    return rolling ? (slots > residual ? slots - residual : 0) : slots - slots % (residual ? residual : 1);
  }
};
#ifdef K_BITS
using K = Spec<Layout(K_LAYOUT), K_BITS, K_GROUP, K_RESIDUAL, K_ROLLING, Number(K_DTYPE), K_TOKEN_SCALE, K_ROTATED,
               K_CHOOSES>;
using V = Spec<Layout(V_LAYOUT), V_BITS, V_GROUP, V_RESIDUAL, V_ROLLING, Number(V_DTYPE), V_TOKEN_SCALE, V_ROTATED,
               V_CHOOSES>;
#endif

struct Store {               // K or V: kvsuite/kernels/paged.py: KVStore
  uint8_t* codes;            // (pages, PAGE, row_bytes): numbers or codes
  void* scale;               // float16 TOKEN and SYMMETRIC (pages, PAGE, groups), CHANNEL (pages, PAGE / group, DIM),
                             // LEVELS (pages, PAGE); float32 FP8 with token_scale (pages, PAGE);
                             // e4m3 bytes E2M1 (pages, PAGE, groups)
  uint16_t* zero;            // float16, as scale; TOKEN and CHANNEL
  void* residual;            // (rows, kv_heads, residual, DIM)
  float tensor_scale;        // FP8 without token_scale, and E2M1: by which all numbers are multiplied; else 1
};
struct Cache {
  int64_t rows, kv_heads, columns;
  const int32_t* page_table;                 // (rows, kv_heads, columns); 0 where a page was given back and positions are kept
  int64_t *slots, *tokens, *seen;            // (rows, kv_heads), the same, (rows,): counted on the host, the step included
  int64_t* free_slot;                        // (rows, kv_heads), as are the next three: see kvsuite/kernels/paged.py: Rows
  const int64_t *limit, *used_columns, *budget;
  int32_t* positions;                        // (pages, PAGE), -1 for an empty slot; null where slot and position are the same
  float *accumulated, *newest;               // (pages, PAGE) or null
  Store k, v;
  const float* inverse_frequency;            // (rotary_half,), where sinks are re-rotated
  int64_t rotary_half, sinks;                // sinks: first tokens whose keys stand where the cache has them; 0 for none
  void* original_sinks;                      // (rows, kv_heads, sinks, DIM) in K's dtype, or null where pages are encoded
};
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of the runtime that torch uses
struct Threads { Parallel parallel; int64_t count; };                  // null: the calling thread alone
static inline void run(void (*work)(void*), void* job, const Threads& t) {  // on all threads, which share the job out
  if (t.parallel && t.count > 1) t.parallel(work, job, unsigned(t.count), 0);
  else work(job);
}
// x (DIM) turned by an orthonormal Hadamard matrix, in blocks of the largest power of two that divides DIM: the sums of
// kvsuite/kernels/hadamard.py, in their order.
static inline void hadamard(float* x) {
  constexpr int block = DIM & -DIM;
  for (int width = 1; width < block; width *= 2)
    for (int first = 0; first < DIM; first += 2 * width)
      for (int i = first; i < first + width; i++) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b, x[i + width] = a - b;
      }
  const float scale = float(1 / sqrt(double(block)));
  for (int d = 0; d < DIM; d++) x[d] *= scale;
}
// A (row, kv head)'s slot in its residual.
template <class S> static inline uint8_t* residual_row(const Store& store, int64_t pair, int64_t slot) {
  const int64_t row = pair * S::residual + slot % (S::residual ? S::residual : 1);
  return static_cast<uint8_t*>(store.residual) + row * DIM * S::number_bytes;
}

static inline float from_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7FFF) << 13;
  float x;
  if ((h & 0x7C00) == 0x7C00) rest |= 0x70000000;  // infinite or not a number: the exponent of float32
  memcpy(&x, &rest, 4);
  if ((h & 0x7C00) != 0x7C00) x *= 5192296858534827628530496329220096.f;  // 2^112: exact, of subnormal numbers, too
  memcpy(&rest, &x, 4);
  rest |= sign;
  memcpy(&x, &rest, 4);
  return x;
}
static inline float from_bfloat(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}
static inline float from_e4m3(uint8_t code) {  // as float16 with another bias
  if ((code & 0x7F) == 0x7F) return NAN;
  return from_half(uint16_t((code & 0x80) << 8 | (code & 0x7F) << 7)) * 256;
}
template <Number N> static inline float number(const void* p, int64_t i) {
  if (N == FLOAT32) {
    float x;
    memcpy(&x, static_cast<const uint8_t*>(p) + i * 4, 4);
    return x;
  }
  uint16_t h;
  memcpy(&h, static_cast<const uint8_t*>(p) + i * 2, 2);
  return N == FLOAT16 ? from_half(h) : from_bfloat(h);
}
static inline float number(const void* p, int64_t dtype, int64_t i) {  // of a dtype that is known at run time
  return dtype == FLOAT32 ? number<FLOAT32>(p, i) : dtype == FLOAT16 ? number<FLOAT16>(p, i) : number<BFLOAT16>(p, i);
}
static inline uint16_t to_bfloat(float x) {  // to the nearest, ties to even
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return uint16_t(u >> 16 | 64);
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
static inline uint16_t to_half(float x) {  // to the nearest, ties to even; beyond 65504 infinite
  uint32_t u;
  memcpy(&u, &x, 4);
  uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7FFFFFFF;
  if (u > 0x7F800000) return sign | 0x7E00;
  if (u >= 0x477FF000) return sign | 0x7C00;
  if (u < 0x38800000) {  // subnormal: float32 rounds while it adds
    float y;
    memcpy(&y, &u, 4);
    y += 0.5f;
    memcpy(&u, &y, 4);
    return sign | uint16_t(u - 0x3F000000);
  }
  return sign | uint16_t((u + 0xFFF + (u >> 13 & 1) - 0x38000000) >> 13);
}
template <Number N> static inline void put(void* p, int64_t i, float x) {
  if (N == FLOAT32) memcpy(static_cast<uint8_t*>(p) + i * 4, &x, 4);
  else {
    const uint16_t h = N == FLOAT16 ? to_half(x) : to_bfloat(x);
    memcpy(static_cast<uint8_t*>(p) + i * 2, &h, 2);
  }
}
