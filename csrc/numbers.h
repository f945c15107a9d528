/* numbers.h: arithmetic of sizes and positions.  Used by plan.h and all that includes it, cache.c and rope.c. */
#ifndef GQA_NUMBERS_H
#define GQA_NUMBERS_H

#include <stdint.h>

static inline int64_t gqa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t gqa_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* a - b, kept within int64: positions may be any integers. */
static inline int64_t gqa_less(int64_t a, int64_t b) {
    int64_t x;
    return !__builtin_sub_overflow(a, b, &x) ? x : a < b ? INT64_MIN : INT64_MAX;
}

static inline int64_t gqa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t gqa_round_up(int64_t a, int64_t b) { return gqa_ceil_div(a, b) * b; }

#endif
