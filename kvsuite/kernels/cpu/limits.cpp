// What this CPU can do at most: bytes read, and multiply-adds of 16-bit codes. kernels/cpu_attention.py prints how far
// the kernels are from it.
#define HEAD_DIM 64
#define GROUP 1
#include <atomic>
#include "simd.h"

struct Read {
  const uint8_t* p;
  int64_t bytes;
  std::atomic<int64_t> next, sum;
};
struct Multiply {
  int64_t rounds;
  std::atomic<int64_t> sum;
};
enum { STRETCH = 1 << 17 };
static void read(void* argument) {
  Read& job = *static_cast<Read*>(argument);
  for (int64_t i; (i = job.next.fetch_add(STRETCH)) + STRETCH <= job.bytes;) {
    Int<LANES> a = {}, b = {};
    for (int64_t j = 0; j < STRETCH; j += LANES * 8)
      a += load<Int<LANES>>(job.p + i + j), b += load<Int<LANES>>(job.p + i + j + LANES * 4);
    a += b;
    for (int l = 0; l < LANES; l++) job.sum += a[l];
  }
}
static void multiply(void* argument) {
  Multiply& job = *static_cast<Multiply*>(argument);
  Int<LANES> sums[8] = {}, x = splat<LANES>(0x10001);
  for (int64_t i = 0; i < job.rounds; i++)
    for (auto& sum : sums) {
#if WIDE
      asm volatile("" : "+v"(x));  // else the compiler multiplies once for all
#endif
      sum = dot16(sum, x, x);
    }
  for (auto& sum : sums) job.sum += sum[0];
}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void read_memory(const uint8_t* p, int64_t bytes, const Threads* t) {
  Read job{p, bytes, {0}, {0}};
  run(read, &job, *t);
}
EXPORT int64_t multiply_add(int64_t rounds, const Threads* t) {  // how many were done
  Multiply job{rounds, {0}};
  run(multiply, &job, *t);
  return rounds * 8 * LANES * 2 * t->count;
}
