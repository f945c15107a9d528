/* avx512_bf16.h: the words of avx512.h, and those for pairs of bfloat16 (AVX512_BF16): LANES pairs a vector, the
 * first of a pair in the low half. */
#include "avx512.h"

#include <stdint.h>
#include <string.h>

#define PAIRS

typedef __m512i pairs;

static inline pairs vload_pairs(const void *p) { return _mm512_loadu_si512(p); }
static inline pairs vload_pairs_n(const void *p, int n) {
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1u), p);
}
static inline pairs vset_pair(const void *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
/* c + a.first * b.first + a.second * b.second in each lane */
static inline vec vfma_pairs(pairs a, pairs b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
