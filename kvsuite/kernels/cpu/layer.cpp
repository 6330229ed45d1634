// What is compiled for each pair of formats: the operations of kvsuite.kernels.cpu on a layer's cache.
#include "attend.h"
#include "count.h"
#include "store.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void kv_attend(const Cache* c, const Attend* a, const Threads* t) { attend(*c, *a, *t); }
EXPORT int64_t kv_advance(const Cache* c, const Advance* a) { return advance(*c, *a); }
EXPORT void kv_append(const Cache* c, const Append* a, const Threads* t) { append(*c, *a, *t); }
EXPORT void kv_fill(const Cache* c, const Fill* f, const Threads* t) { fill(*c, *f, *t); }
EXPORT void kv_evict(const Cache* c, const Evict* e, const Threads* t) { evict(*c, *e, *t); }
