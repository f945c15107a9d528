/* amx_bf16.h: the words of avx512.h, and those for matrices of bfloat16 (AMX-BF16): a register holds 16 rows of LANES
 * sums, or of LANES pairs, the first of a pair in the low half.
 *
 * Registers are fixed: sums in 0 to 2, left factors in 3 to 5, the right one in 6. */
#include "avx512.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MATRICES 3    /* left factors at a time */
enum { MATRIX = 16 }; /* rows of a register */

typedef __m512i pairs;

static inline vec vtop(vec x) { /* cut to a bfloat16 */
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}
static inline void vstore_tops(void *p, vec first, vec second) { /* pairs of what vtop keeps */
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(vtop(second))));
}

static inline __m512i vhalves_n(const void *p, int n) { /* n halves of a row, and zeros */
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1u), p));
}
static inline pairs vzip_halves(const void *first, int n, const void *second, int m) {
    return _mm512_or_si512(vhalves_n(first, n), _mm512_slli_epi32(vhalves_n(second, m), 16));
}
/* What is finite, as a vector of bits, else 0; clears *all where something is not. */
static inline vec vfinite_bits(pairs x, bool *all) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const __mmask32 finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    *all = *all && finite == UINT32_MAX;
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(finite, x));
}

/* What was stored is in memory: gcc does not see that a matrix is loaded from there. */
static inline void stored(void) { __asm__ __volatile__("" ::: "memory"); }

/* Products of up to three left factors, MATRIX rows after MATRIX rows, with one right factor: `rows` rows in all. */
static inline void mbegin(int rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1, .bytes = {[6] = 64}, .rows = {[6] = MATRIX}};
    for (int i = 0; i < MATRICES && rows > 0; i++, rows -= MATRIX) {
        shape.rows[i] = shape.rows[MATRICES + i] = (uint8_t)(rows < MATRIX ? rows : MATRIX);
        shape.bytes[i] = shape.bytes[MATRICES + i] = 64;
    }
    stored();
    _tile_loadconfig(&shape);
}
static inline void mend(void) { _tile_release(); }

static inline void mzero(int blocks) {
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (blocks > 2) _tile_zero(2);
}
static inline void mstore(char *p, ptrdiff_t step, int blocks) {
    _tile_stored(0, p, step);
    if (blocks > 1) _tile_stored(1, p + MATRIX * step, step);
    if (blocks > 2) _tile_stored(2, p + 2 * MATRIX * step, step);
}
static inline void mleft(const char *p, ptrdiff_t step, int blocks) {
    stored();
    _tile_loadd(3, p, step);
    if (blocks > 1) _tile_loadd(4, p + MATRIX * step, step);
    if (blocks > 2) _tile_loadd(5, p + 2 * MATRIX * step, step);
}
static inline void mfma(const char *right, ptrdiff_t step, int blocks) { /* sums += left * right */
    _tile_loadd(6, right, step);
    _tile_dpbf16ps(0, 3, 6);
    if (blocks > 1) _tile_dpbf16ps(1, 4, 6);
    if (blocks > 2) _tile_dpbf16ps(2, 5, 6);
}
