// Writing tokens into a cache, with the very bits of kvsuite/kernels/reference/store.py: what becomes of a (row, head)
// depends on nothing else, so heads are shared out among threads.
#pragma once
#include "kv.h"
#include "levels.h"

#include <atomic>

struct Append {
  const void *k, *v;                  // (batch, kv_heads, tokens, DIM) in dtype, the last dimension contiguous
  int64_t k_stride[3], v_stride[3];   // numbers, not bytes
  Number dtype;
  int64_t items, tokens;              // items: rows that are written
  const int64_t *item_of_row, *rows;  // (items,): each one's index in the batch and in the cache
  const int64_t* slots;               // (items, kv_heads): where the first new token goes
};
struct Fill {
  const void *k, *v;                  // (kv_heads, length, DIM)
  int64_t k_stride[2], v_stride[2];
  Number dtype;
  int64_t row, length;
  const int64_t* const* keep;         // by head: the tokens that stay, or null for all
  const int64_t* counts;              // (kv_heads,): how many these are, or null
  const float* accumulated;           // (kv_heads, length), or null for zeros
};

namespace writing {

struct Tokens {  // one head's new tokens, x[keep[0]], x[keep[1]] …
  const void* x;
  int64_t stride;
  Number dtype;
  const int64_t* keep;
  int64_t at(int64_t i) const { return keep ? keep[i] : i; }
};
struct Place {  // a (row, head) of the cache
  int64_t pair;
  const int32_t* pages;
  int64_t of(int64_t slot) const { return int64_t(pages[slot / PAGE]) * PAGE + slot % PAGE; }
};

// ---- numbers

template <Number TO, Number FROM> static void convert(const void* from, void* to) {
  for (int d = 0; d < DIM; d++) put<TO>(to, d, number<FROM>(from, d));
}

// A new token in the dtype that is stored: where that is its own, the token itself, else a copy in ``own``.
template <class S> static const void* new_row(const Tokens& t, int64_t i, void* own) {
  const int64_t bytes = t.dtype == FLOAT32 ? 4 : 2;
  const void* x = static_cast<const uint8_t*>(t.x) + t.at(i) * t.stride * bytes;
  if (t.dtype == S::dtype) return x;
  if (t.dtype == FLOAT32) convert<S::dtype, FLOAT32>(x, own);
  else if (t.dtype == FLOAT16) convert<S::dtype, FLOAT16>(x, own);
  else convert<S::dtype, BFLOAT16>(x, own);
  return own;
}

// float16 towards +∞ or -∞: the size is cut off, and one more where that is the wrong way. Without a branch, so that it
// is computed for many channels at once.
static inline uint16_t half_towards(float x, bool up) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 31, all = u & 0x7FFFFFFF;
  const uint32_t beyond = all < 0x7F800000 ? 0x477FE001 : all == 0x7F800000 ? 0x47800000 : 0x47C00000;  // 65504+, ∞, NaN
  const uint32_t size = all < beyond ? all : beyond;
  const bool normal = size >= 0x38800000;
  const float units = normal ? 0 : fabsf(x) * 16777216.f;  // 2^24: of subnormal numbers
  const uint32_t below = normal ? (size - 0x38000000) >> 13 : uint32_t(int(units));
  const bool more = normal ? (size & 0x1FFF) != 0 : units > float(int(units));
  return uint16_t(sign << 15 | (below + uint32_t(more & (up != (sign != 0)))));
}

// The least and the largest of N numbers; none where one of them is not finite.
template <int N> static void extremes(const float* x, float& low, float& high) {
  float finite = low = high = x[0];
  finite *= 0;
  for (int i = 1; i < N; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    finite += x[i] * 0;
  }
  low += finite, high += finite;
}

// ---- codes: kvsuite/kernels/quantize.py

struct Range {  // of the numbers that share a scale
  uint16_t scale, zero;
  float step, start;  // what codes are taken against: the stored scale (1 where that is 0) and zero
};
template <int BITS> static inline Range range(float low, float high) {
  Range r;
  r.zero = half_towards(low, false);
  r.start = from_half(r.zero);
  r.scale = half_towards((high - r.start) / float((1 << BITS) - 1), true);
  r.step = from_half(r.scale);
  if (!(r.step > 0)) r.step = 1;
  return r;
}

// The codes of a token, packed in parts; step and start have a number per channel.
template <int BITS> static void pack(const float* x, const float* step, const float* start, uint8_t* out) {
  constexpr int parts = 8 / BITS, width = DIM / parts;
  constexpr float most = (1 << BITS) - 1;
  uint8_t codes[DIM];
  for (int d = 0; d < DIM; d++) {
    float code = rintf((x[d] - start[d]) / step[d]);
    code = code > 0 ? code : 0;
    codes[d] = uint8_t(int(code < most ? code : most));
  }
  for (int i = 0; i < width; i++) {
    int byte = codes[i];
    for (int part = 1; part < parts; part++) byte |= codes[part * width + i] << (part * BITS);
    out[i] = uint8_t(byte);
  }
}

static inline uint8_t to_e4m3(float x) {  // to the nearest, ties to even, at most ±448; not a number stays that
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 24 & 0x80, size = u & 0x7FFFFFFF;
  const uint32_t least = size < 0x43E00000 ? size : 0x43E00000;  // 448
  float small;
  memcpy(&small, &least, 4);
  small += 16384.f;  // subnormal: float32 rounds while it adds
  memcpy(&u, &small, 4);
  const uint32_t normal = (least + 0x7FFFF + (least >> 20 & 1) - 0x3C000000) >> 20;
  return uint8_t(sign | (size > 0x7F800000 ? 0x7F : least < 0x3C800000 ? u - 0x46800000 : normal));
}

// ---- blocks: kvsuite/methods/codecs/q8_0.py and nvfp4.py

// The largest size of N numbers; none where one of them is none.
template <int N> static float largest_size(const float* x) {
  float most = 0, unknown = 0;
  for (int i = 0; i < N; i++) {
    const float size = fabsf(x[i]);
    most = size > most ? size : most;
    unknown += size != size ? size : 0;
  }
  return most + unknown;
}
// The codes of a block of N numbers, and its scale.
template <int N> static uint16_t symmetric(const float* x, uint8_t* codes) {
  const float scale = largest_size<N>(x) / 127, one = 1 / scale, inverse = isinf(one) ? 0 : one;
  for (int i = 0; i < N; i++) {
    const float scaled = x[i] * inverse, size = fabsf(scaled), whole = floorf(size);
    const float code = whole + float(size - whole >= 0.5f);
    codes[i] = uint8_t(int8_t(code == code ? scaled < 0 ? -code : code : 0));
  }
  return to_half(scale);
}

static inline uint8_t to_e2m1(float x) {  // kvsuite/kernels/fp4.py
  const float size = fabsf(x);
  const int above = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5);
  return uint8_t(above | (signbit(x) ? 8 : 0));
}
// The codes of a block of N numbers whose largest is to be ``full``, its scale, and the squared error.
template <int N> static uint8_t e2m1(const float* x, float full, float fixed, uint8_t* codes, double& error) {
  const float most = largest_size<N>(x) / (full * fixed);
  const uint8_t scale = to_e4m3(most);
  const float step = from_e4m3(scale) * fixed;
  error = 0;
  for (int i = 0; i < N; i++) {
    codes[i] = to_e2m1(step == 0 ? x[i] / INFINITY : x[i] / step);
    const double off = E2M1_NUMBERS[codes[i]] * step - x[i];
    error += off * off;
  }
  return scale;
}

// ---- levels: kvsuite/methods/codecs/turboquant.py

static inline float root_mean_square(const float* x) {
  double sum = 0;
  for (int d = 0; d < DIM; d++) sum += double(x[d]) * double(x[d]);
  const float size = float(sqrt(sum / DIM));
  return size + size * 0;  // infinite: not a number
}
// The codes of x (DIM), 4 bits each, and the scale that brings their levels to its norm.
static inline uint16_t levels(const float* x, uint8_t* out) {
  const float scale = root_mean_square(x), unit = scale == 0 ? 1 : scale;
  uint8_t codes[DIM];
  float chosen[DIM];
  for (int d = 0; d < DIM; d++) {
    int code = 0;
    for (int i = 0; i < 15; i++) code += !(x[d] / unit < EDGES_4[i]);  // not a number is beyond all
    codes[d] = uint8_t(code), chosen[d] = LEVELS_4[code];
  }
  for (int i = 0; i < DIM / 2; i++) out[i] = uint8_t(codes[i] | codes[i + DIM / 2] << 4);
  return to_half(scale / root_mean_square(chosen));
}

// ``unit`` tokens, each DIM numbers in the stored dtype, into their place of the pages: CHANNEL its group, else one.
template <class S> static void encode(const Store& store, int64_t place, const void* const* rows) {
  if constexpr (S::layout == PLAIN) {
    memcpy(store.codes + place * S::row_bytes, rows[0], S::row_bytes);
  } else {
    constexpr int unit = S::layout == CHANNEL ? S::group : 1;
    alignas(64) float x[unit][DIM], step[DIM], start[DIM];
    uint8_t* codes = store.codes + place * S::row_bytes;
    for (int i = 0; i < unit; i++)
      for (int d = 0; d < DIM; d++) x[i][d] = number<S::dtype>(rows[i], d);
    if constexpr (S::rotated) hadamard(x[0]);  // one token
    if constexpr (S::layout == LEVELS) {
      static_cast<uint16_t*>(store.scale)[place] = levels(x[0], codes);
    } else if constexpr (S::layout == SYMMETRIC) {
      for (int g = 0; g < S::groups; g++)
        static_cast<uint16_t*>(store.scale)[place * S::groups + g] =
            symmetric<S::group>(x[0] + g * S::group, codes + g * S::group);
    } else if constexpr (S::layout == E2M1) {
      uint8_t chosen[2][DIM], *scales = static_cast<uint8_t*>(store.scale) + place * S::groups;
      for (int g = 0; g < S::groups; g++) {
        const int at = g * S::group;
        double error, other;
        scales[g] = e2m1<S::group>(x[0] + at, 6, store.tensor_scale, chosen[0] + at, error);
        if (!S::chooses) continue;
        const uint8_t scale = e2m1<S::group>(x[0] + at, 4, store.tensor_scale, chosen[1] + at, other);
        if (other < error) scales[g] = scale, memcpy(chosen[0] + at, chosen[1] + at, S::group);
      }
      for (int i = 0; i < DIM / 2; i++) codes[i] = uint8_t(chosen[0][i] | chosen[0][i + DIM / 2] << 4);
    } else if constexpr (S::layout == FP8) {
      float scale = store.tensor_scale;
      if (S::token_scale) {
        const float largest = largest_size<DIM>(x[0]);
        scale = largest > 0 ? largest / 448 : 1;
        static_cast<float*>(store.scale)[place] = scale;
      }
      for (int d = 0; d < DIM; d++) codes[d] = to_e4m3(x[0][d] / scale);
    } else {
      constexpr int ranges = S::layout == CHANNEL ? DIM : S::groups;
      uint16_t* scales = static_cast<uint16_t*>(store.scale) + place / unit * ranges;
      uint16_t* zeros = store.zero + place / unit * ranges;
      float low[ranges], high[ranges];
      if constexpr (S::layout == CHANNEL) {
        float finite[DIM];
        for (int d = 0; d < DIM; d++) low[d] = high[d] = x[0][d], finite[d] = x[0][d] * 0;
        for (int i = 1; i < unit; i++)
          for (int d = 0; d < DIM; d++) {
            low[d] = low[d] < x[i][d] ? low[d] : x[i][d];
            high[d] = high[d] > x[i][d] ? high[d] : x[i][d];
            finite[d] += x[i][d] * 0;
          }
        for (int d = 0; d < DIM; d++) low[d] += finite[d], high[d] += finite[d];
      } else {
        for (int g = 0; g < ranges; g++) extremes<S::group>(x[0] + g * S::group, low[g], high[g]);
      }
      for (int g = 0; g < ranges; g++) {
        const Range r = range<S::bits>(low[g], high[g]);
        scales[g] = r.scale, zeros[g] = r.zero;
        for (int d = g * (DIM / ranges); d < (g + 1) * (DIM / ranges); d++) step[d] = r.step, start[d] = r.start;
      }
      for (int i = 0; i < unit; i++) pack<S::bits>(x[i], step, start, codes + i * S::row_bytes);
    }
  }
}

// ---- tokens

// Store n tokens in slots first …, which are the next ones, or one of them in any slot that was evicted.
template <class S> static void write(const Store& store, const Place& place, int64_t first, int64_t n, const Tokens& t,
                                     bool step) {
  constexpr int unit = S::layout == CHANNEL ? S::group : 1;
  alignas(64) uint8_t own[unit][DIM * S::number_bytes];
  const int64_t end = first + n, done = S::encoded(first);
  const int64_t target = S::residual == 0 ? end : S::encoded(end);
  for (int64_t slot = done; slot < target; slot += unit) {
    const void* rows[unit];
    for (int i = 0; i < unit; i++) {
      const int64_t s = slot + i;
      rows[i] = s < first ? residual_row<S>(store, place.pair, s) : new_row<S>(t, s - first, own[i]);
    }
    encode<S>(store, place.of(slot), rows);
  }
  if constexpr (S::residual > 0) {  // the reference's step puts even a token there that completes it, its prompt does not
    const int64_t stay = step || target < first ? first : target;
    for (int64_t slot = stay; slot < end; slot++)
      memcpy(residual_row<S>(store, place.pair, slot), new_row<S>(t, slot - first, own[0]), sizeof own[0]);
  }
}

// Call body(i) for each i < n, on several threads where that is worth their waking: numbers are all that is written.
template <class Body> static void share(const Threads& threads, int64_t n, int64_t numbers, const Body& body) {
  struct Job {
    const Body* body;
    int64_t n;
    std::atomic<int64_t> next;
    static void run(void* self) {
      Job& job = *static_cast<Job*>(self);
      for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;) (*job.body)(i);
    }
  } job{&body, n, {0}};
  if (numbers >= 16384) ::run(Job::run, &job, threads);
  else Job::run(&job);
}

static inline Place place(const Cache& c, int64_t row, int64_t head) {
  const int64_t pair = row * c.kv_heads + head;
  return {pair, c.page_table + pair * c.columns};
}
static inline Tokens tokens(const void* x, int64_t offset, int64_t stride, Number dtype, const int64_t* keep) {
  return {static_cast<const uint8_t*>(x) + offset * (dtype == FLOAT32 ? 4 : 2), stride, dtype, keep};
}

}  // namespace writing

// Write the tokens that PagedKV.advance counted.
static void append(const Cache& c, const Append& a, const Threads& t) {
  const int64_t n = a.tokens, numbers = n == 1 ? 0 : 2 * a.items * c.kv_heads * n * DIM;  // one per row: at once
  writing::share(t, a.items * c.kv_heads, numbers, [&](int64_t i) {
    const int64_t item = i / c.kv_heads, head = i % c.kv_heads, b = a.item_of_row[item], first = a.slots[i];
    const writing::Place place = writing::place(c, a.rows[item], head);
    const int64_t k = b * a.k_stride[0] + head * a.k_stride[1], v = b * a.v_stride[0] + head * a.v_stride[1];
    writing::write<K>(c.k, place, first, n, writing::tokens(a.k, k, a.k_stride[2], a.dtype, nullptr), n == 1);
    writing::write<V>(c.v, place, first, n, writing::tokens(a.v, v, a.v_stride[2], a.dtype, nullptr), n == 1);
    if (!c.positions) return;
    for (int64_t j = 0; j < n; j++) {
      const int64_t at = place.of(first + j);
      c.positions[at] = int32_t(c.seen[a.rows[item]] - n + j);
      if (c.accumulated) c.accumulated[at] = 0;
      if (c.newest) c.newest[at] = 0;
    }
  });
}

// Put a prompt, or what is kept of it, into an empty row: a head's j-th token goes to its slot j.
static void fill(const Cache& c, const Fill& f, const Threads& t) {
  writing::share(t, c.kv_heads, 2 * c.kv_heads * f.length * DIM, [&](int64_t head) {
    const writing::Place place = writing::place(c, f.row, head);
    const int64_t n = f.counts ? f.counts[head] : f.length;
    const int64_t* keep = f.keep ? f.keep[head] : nullptr;
    const writing::Tokens k = writing::tokens(f.k, head * f.k_stride[0], f.k_stride[1], f.dtype, keep);
    writing::write<K>(c.k, place, 0, n, k, false);
    writing::write<V>(c.v, place, 0, n, writing::tokens(f.v, head * f.v_stride[0], f.v_stride[1], f.dtype, keep), false);
    if (!c.positions) return;
    for (int64_t j = 0; j < n; j++) {
      const int64_t at = place.of(j), of = k.at(j);
      c.positions[at] = int32_t(of);
      if (c.accumulated) c.accumulated[at] = f.accumulated ? f.accumulated[head * f.length + of] : 0;
    }
  });
}
