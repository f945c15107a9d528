/* load_tmpl.h: rows of the caller's arrays to reals and back, element by element, for
 * arrays that do not already lie as a kernel wants them, and for masks.
 * Included by kernels_tmpl.h; the table's load, store and spread. */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

/* One element of any alignment and byte order, as bits. */
BLOCK uint64_t bits_at(const char *from, const size_t size, bool swapped) {
    uint8_t byte;
    uint16_t two;
    uint32_t four;
    uint64_t eight;
    switch (size) {
    case 1: memcpy(&byte, from, 1); return byte;
    case 2: memcpy(&two, from, 2); return swapped ? __builtin_bswap16(two) : two;
    case 4: memcpy(&four, from, 4); return swapped ? __builtin_bswap32(four) : four;
    default: memcpy(&eight, from, 8); return swapped ? __builtin_bswap64(eight) : eight;
    }
}

/* A finite number too large for real becomes the largest one, never an infinity: a mask of
 * -1e300 is a number, and only -inf says "masked". */
BLOCK real clamped(double x) {
    const double most = sizeof(real) == sizeof(float) ? (double)FLT_MAX : DBL_MAX;
    return (real)(x > most && x < INFINITY ? most : x < -most && x > -INFINITY ? -most : x);
}

BLOCK real real_at(const char *from, const enum gqa_dtype dtype, bool swapped) {
    switch (dtype) {
    case GQA_BOOL: return bits_at(from, 1, false) ? 0 : -INFINITY;
    case GQA_FLOAT16: return gqa_float16_to_float((uint16_t)bits_at(from, 2, swapped));
    case GQA_BFLOAT16: return gqa_bfloat16_to_float((uint16_t)bits_at(from, 2, swapped));
    case GQA_FLOAT32: return gqa_float_from_bits((uint32_t)bits_at(from, 4, swapped));
    default: return clamped(gqa_double_from_bits(bits_at(from, 8, swapped)));
    }
}

BLOCK void load_as(real *to, ptrdiff_t to_stride, const char *from, ptrdiff_t step, const enum gqa_dtype dtype,
                   bool swapped, int n) {
    for (int i = 0; i < n; i++) to[i * to_stride] = real_at(from + i * step, dtype, swapped);
}

static void load(void *to, ptrdiff_t to_stride, const char *from, ptrdiff_t step, enum gqa_dtype dtype, bool swapped,
                 int n) {
    switch (dtype) {
    case GQA_BOOL: load_as(to, to_stride, from, step, GQA_BOOL, false, n); break;
    case GQA_FLOAT16: load_as(to, to_stride, from, step, GQA_FLOAT16, swapped, n); break;
    case GQA_BFLOAT16: load_as(to, to_stride, from, step, GQA_BFLOAT16, swapped, n); break;
    case GQA_FLOAT32: load_as(to, to_stride, from, step, GQA_FLOAT32, swapped, n); break;
    case GQA_FLOAT64: load_as(to, to_stride, from, step, GQA_FLOAT64, swapped, n); break;
    }
}

/* Outputs have the arithmetic's own type. */
static void store(char *to, ptrdiff_t step, bool swapped, const void *from, ptrdiff_t from_stride, int n) {
    for (int i = 0; i < n; i++) {
        const char *value = (const char *)((const real *)from + i * from_stride);
        const uint64_t bits = bits_at(value, sizeof(real), swapped);
        const uint32_t low = (uint32_t)bits;
        memcpy(to + i * step, sizeof(real) == sizeof low ? (const void *)&low : (const void *)&bits, sizeof(real));
    }
}

static void spread(void *to, ptrdiff_t to_stride, const void *from, int n, double scale) {
    const real factor = clamped(scale); /* 1e300 beside floats: 0 times it must stay 0 */
    for (int i = 0; i < n; i++) ((real *)to)[i * to_stride] = ((const real *)from)[i] * factor;
}
