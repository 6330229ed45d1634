// What is decided around a step: where its tokens go, and which are evicted after it.
#pragma once
#include "store.h"

struct Advance {
  const int64_t* rows;    // (items,)
  int64_t items, tokens;  // tokens: that each row gets
  int64_t evicts;         // whether a single token takes an evicted one's slot
  int64_t* slots;         // (items, kv_heads): where the first new token goes
};
enum Advanced { FULL = -1, ENOUGH, PAGES };  // no room: nothing is counted; done; done, and pages are to be allocated

struct Evict {
  const int64_t* rows;  // (items,)
  int64_t items;
  const float* values;  // (pages, PAGE): whose lowest goes; null: positions
  int64_t first;        // tokens at positions below it stay
  const int32_t* recent;  // (rows,): so many of the most recent stay; null: none
};

template <class S> static constexpr bool by_token() { return S::layout != CHANNEL && S::residual == 0; }

// PagedKV.advance, but for the pages.
static int64_t advance(const Cache& c, const Advance& a) {
  const bool refill = a.evicts && a.tokens == 1 && by_token<K>() && by_token<V>();
  bool enough = true;
  for (int64_t i = 0; i < a.items * c.kv_heads; i++) {
    const int64_t pair = a.rows[i / c.kv_heads] * c.kv_heads + i % c.kv_heads, used = c.slots[pair];
    const bool again = refill && c.tokens[pair] < used;
    const int64_t after = again ? used : used + a.tokens, k = K::encoded(after), v = V::encoded(after);
    if (after > c.limit[pair]) return FULL;
    a.slots[i] = again ? c.free_slot[pair] : used;
    enough &= (c.positions ? after : k > v ? k : v) <= c.used_columns[pair] * PAGE;
  }
  for (int64_t i = 0; i < a.items * c.kv_heads; i++) {
    const int64_t pair = a.rows[i / c.kv_heads] * c.kv_heads + i % c.kv_heads;
    if (!(refill && c.tokens[pair] < c.slots[pair])) c.slots[pair] += a.tokens;
    c.tokens[pair] += a.tokens;
  }
  for (int64_t i = 0; i < a.items; i++) c.seen[a.rows[i]] += a.tokens;
  return enough ? ENOUGH : PAGES;
}

// A number's place in the order that numpy's argmin knows: not a number is the least, 0 and -0 are the same.
static inline int32_t order(float x) {
  const float y = x + 0.f;
  int32_t bits;
  memcpy(&bits, &y, 4);
  return y != y ? INT32_MIN : bits ^ (bits >> 31 & INT32_MAX);
}

// The slot whose value is the lowest, the first of several. Empty slots and tokens that stay count as infinite.
static int64_t lowest(const Cache& c, const Evict& e, const int32_t* pages, int64_t slots, int32_t end) {
  int64_t best = INT64_MAX, found = 0;
  const int32_t first = e.first > 0 ? int32_t(e.first) : 0;  // also: -1 is no token
  for (int64_t start = 0; start < slots; start += PAGE) {
    const int64_t at = int64_t(pages[start / PAGE]) * PAGE;
    int32_t orders[PAGE], least = INT32_MAX;
    for (int i = 0; i < PAGE; i++) {
      const int32_t position = c.positions[at + i];
      const int32_t own = order(e.values ? e.values[at + i] : float(position));
      orders[i] = position < first || position >= end ? order(INFINITY) : own;
      least = orders[i] < least ? orders[i] : least;
    }
    if (least >= best) continue;
    best = least;
    for (found = start; orders[found - start] != least;) found++;
  }
  return found;
}

// One token of each (row, head) beyond its budget goes, and is counted as gone.
static void evict(const Cache& c, const Evict& e, const Threads& t) {
  writing::share(t, e.items * c.kv_heads, e.items * c.kv_heads * c.columns * PAGE, [&](int64_t i) {
    const int64_t row = e.rows[i / c.kv_heads], head = i % c.kv_heads;
    const writing::Place place = writing::place(c, row, head);
    int64_t& tokens = c.tokens[place.pair];
    if (tokens <= c.budget[place.pair]) return;
    if (c.original_sinks && tokens == c.seen[row]) {  // the reference's keep_sinks
      uint8_t* kept = static_cast<uint8_t*>(c.original_sinks) + place.pair * c.sinks * K::row_bytes;
      for (int64_t slot = 0; slot < c.sinks && slot < c.slots[place.pair]; slot++)
        memcpy(kept + slot * K::row_bytes, c.k.codes + place.of(slot) * K::row_bytes, K::row_bytes);
    }
    const int32_t end = e.recent ? int32_t(c.seen[row] - e.recent[row]) : INT32_MAX;
    const int64_t slot = lowest(c, e, place.pages, c.slots[place.pair], end);
    c.positions[place.of(slot)] = -1;
    if (by_token<K>() && by_token<V>()) c.free_slot[place.pair] = slot;
    tokens--;
  });
}
