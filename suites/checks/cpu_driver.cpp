// The cpu backend's library on a cache of its own, for sanitizers: every buffer is exactly as large as it must be and
// full of NaN, and prompts, steps and evictions come in random order.
#include <stdio.h>
#include <vector>
#include "layer.cpp"

static uint32_t state = 1;
static uint32_t random_number() { return state = state * 1664525 + 1013904223; }
static int below(int n) { return int(random_number() >> 8) % n; }
static float normal() {
  float x = 0;
  for (int i = 0; i < 6; i++) x += float(random_number() >> 8) / float(1 << 24) - 0.5f;
  return x;
}
template <class T> static T* memory(size_t n) {
  T* p = static_cast<T*>(malloc(n * sizeof(T) + (n == 0)));
  memset(static_cast<void*>(p), 255, n * sizeof(T));
  return p;
}
template <class S> static Store store_of(int64_t pages, int64_t rows, int64_t heads) {
  const int64_t tokens = pages * PAGE, scales = S::layout == CHANNEL ? tokens / S::group * DIM : tokens * S::groups;
  Store s{};
  s.codes = memory<uint8_t>(size_t(tokens * S::row_bytes));
  if (S::layout == TOKEN || S::layout == CHANNEL) s.zero = memory<uint16_t>(size_t(scales));
  if (S::layout != PLAIN && S::layout != FP8) s.scale = memory<uint16_t>(size_t(scales));
  if (S::layout == FP8 && S::token_scale) s.scale = memory<float>(size_t(tokens));
  s.residual = memory<uint8_t>(size_t(rows * heads * S::residual * DIM * S::number_bytes));
  s.tensor_scale = S::layout == FP8 || S::layout == E2M1 ? 0.5f : 1.f;
  return s;
}
static std::vector<float> numbers(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& y : x) y = normal();
  return x;
}

int main() {
  enum { ROWS = 3, HEADS = 2, COLUMNS = 20, LIMIT = COLUMNS * PAGE };
  const int64_t pages = ROWS * HEADS * COLUMNS;
  std::vector<int32_t> table(pages);
  std::vector<int64_t> slots(ROWS * HEADS), tokens(ROWS * HEADS), seen(ROWS);
  std::vector<int64_t> free_slot(ROWS * HEADS), limit(ROWS * HEADS, LIMIT), used(ROWS * HEADS, COLUMNS), budget(ROWS * HEADS);
  for (int64_t i = 0; i < pages; i++) table[size_t(i)] = int32_t(pages - 1 - i);
  std::vector<float> frequency(DIM / 2, 0.01f);
  Cache c{};
  c.rows = ROWS, c.kv_heads = HEADS, c.columns = COLUMNS, c.page_table = table.data(), c.slots = slots.data();
  c.free_slot = free_slot.data(), c.limit = limit.data(), c.used_columns = used.data(), c.budget = budget.data();
  c.tokens = tokens.data(), c.seen = seen.data(), c.k = store_of<K>(pages, ROWS, HEADS), c.v = store_of<V>(pages, ROWS, HEADS);
  c.positions = memory<int32_t>(size_t(pages * PAGE));
  c.accumulated = memory<float>(size_t(pages * PAGE)), c.newest = memory<float>(size_t(pages * PAGE));
  memset(c.positions, 255, size_t(pages * PAGE) * 4);
  c.inverse_frequency = frequency.data(), c.rotary_half = DIM / 2, c.sinks = K::rotated ? 0 : 4;
  const Threads alone{nullptr, 1};
  double checksum = 0;
  for (int step = 0; step < 300; step++) {
    const int64_t row = below(ROWS);
    if (seen[size_t(row)] == 0 || below(20) == 0) {  // a new prompt
      const int64_t length = 1 + below(LIMIT - 60);
      for (int64_t h = 0; h < HEADS; h++) {
        const size_t own = size_t(row * HEADS + h);
        for (int64_t i = 0; i < COLUMNS; i++) memset(c.positions + table[own * COLUMNS + size_t(i)] * PAGE, 255, PAGE * 4);
        slots[own] = tokens[own] = length;
      }
      seen[size_t(row)] = length;
      std::vector<float> k = numbers(HEADS * length * DIM), v = numbers(HEADS * length * DIM);
      const Fill f{k.data(), v.data(), {length * DIM, DIM}, {length * DIM, DIM}, FLOAT32, row, length, nullptr, nullptr, nullptr};
      kv_fill(&c, &f, &alone);
    } else if (slots[size_t(row * HEADS)] < LIMIT) {
      const int64_t item = 0;
      std::vector<int64_t> at(HEADS);
      const Advance count{&row, 1, 1, 0, at.data()};
      if (kv_advance(&c, &count) != ENOUGH) return printf("step %d: no room\n", step), 1;
      std::vector<float> k = numbers(HEADS * DIM), v = numbers(HEADS * DIM);
      const Append a{k.data(), v.data(), {HEADS * DIM, DIM, DIM}, {HEADS * DIM, DIM, DIM}, FLOAT32, 1, 1, &item, &row, at.data()};
      kv_append(&c, &a, &alone);
    }
    std::vector<int64_t> rows(ROWS + 1, -1);
    for (int64_t i = 0; i < ROWS; i++)
      if (seen[size_t(i)]) rows[size_t(i)] = i;
    std::vector<float> q = numbers((ROWS + 1) * HEADS * GROUP * DIM), out(q.size());
    const int64_t heads = HEADS * GROUP;
    const Attend a{q.data(), out.data(), {heads * DIM, DIM, DIM}, {heads * DIM, DIM, DIM}, FLOAT32, ROWS + 1, 1, rows.data(),
                   0.125f, below(3) ? 0.f : 5.f, below(3) ? 0 : 1 + below(300), nullptr};
    kv_attend(&c, &a, &alone);
    for (float x : out) {
      if (!(x == x) || fabsf(x) > 1e3f) return printf("step %d: %f\n", step, double(x)), 1;
      checksum += double(fabsf(x));
    }
    for (size_t own = 0; own < tokens.size(); own++) budget[own] = tokens[own] > 8 ? tokens[own] - 1 : tokens[own];
    const std::vector<int64_t> every{0, 1, 2};
    const std::vector<int32_t> recent(ROWS, 1);
    const int which = below(3);
    const Evict e{every.data(), ROWS, which == 0 ? nullptr : which == 1 ? c.accumulated : c.newest, 4, recent.data()};
    kv_evict(&c, &e, &alone);
  }
  for (void* p : {(void*)c.k.codes, c.k.scale, (void*)c.k.zero, c.k.residual, (void*)c.v.codes, c.v.scale, (void*)c.v.zero,
                  c.v.residual, (void*)c.positions, (void*)c.accumulated, (void*)c.newest})
    free(p);
  printf("%.6f\n", checksum);
}
