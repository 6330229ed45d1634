// The control's noise, with the bits of kvsuite/kernels/noise.py, which says what it is.
#include <stdint.h>

static const uint64_t GOLDEN = 0x9e3779b97f4a7c15;  // 2^64 / φ: splitmix64's increment

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// `weights`: dim numbers, the same for all vectors.
template <typename T>
static void half_ulp(const T* x, T* out, int64_t vectors, int64_t dim, uint64_t seed, T ulp, T top, uint64_t* weights) {
  for (int64_t d = 0; d < dim; d++) weights[d] = mix((d + 1) * GOLDEN + seed);
  const T magnitude_bits = (T)~((T)1 << (8 * sizeof(T) - 1));
  for (; vectors; vectors--, x += dim, out += dim) {
    uint64_t sum = 0, draws = 0;
    for (int64_t d = 0; d < dim; d++) sum += weights[d] * (uint64_t)((int64_t)x[d] + 1);
    const uint64_t content = mix(sum);
    for (int64_t d = 0; d < dim; d++, draws >>= 2) {
      if (d % 32 == 0) draws = mix(content + d / 32 * GOLDEN);
      const T magnitude = x[d] & magnitude_bits, two = draws & 3;
      const bool movable = magnitude > ulp && magnitude <= top - ulp;
      out[d] = x[d] + (movable ? ((two == 3) - (two == 0)) * ulp : 0);
    }
  }
}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void half_ulp16(const int16_t* x, int16_t* out, int64_t n, int64_t dim, uint64_t seed, int16_t ulp, int16_t top,
                       uint64_t* weights) {
  half_ulp(x, out, n, dim, seed, ulp, top, weights);
}
EXPORT void half_ulp32(const int32_t* x, int32_t* out, int64_t n, int64_t dim, uint64_t seed, int32_t ulp, int32_t top,
                       uint64_t* weights) {
  half_ulp(x, out, n, dim, seed, ulp, top, weights);
}
