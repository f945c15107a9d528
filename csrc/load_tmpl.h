/* load_tmpl.h: rows of the caller's arrays to reals and back, for arrays that do not already lie
 * as a kernel wants them, and for masks.  Halves go by the vector, the rest element by element.
 * Included by kernels_tmpl.h; the table's load, store and multiply. */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

/* ---- rows in place: what few_tmpl.h streams ---- */

/* The dtype of the table's own reals. */
static const enum gqa_dtype OWN = sizeof(real) == sizeof(float) ? GQA_FLOAT32 : GQA_FLOAT64;

/* A dtype that dot and outer_few read in place; doubles go with doubles only. */
BLOCK enum gqa_dtype streamed(enum gqa_dtype dtype) { return sizeof(real) == sizeof(float) ? dtype : OWN; }

BLOCK ptrdiff_t size_of(const enum gqa_dtype dtype) {
    switch (dtype) {
    case GQA_INT8: return 1;
    case GQA_FLOAT16:
    case GQA_BFLOAT16: return 2;
    default: return sizeof(real);
    }
}

/* A vector of a row, from element t on. */
BLOCK vec row_vec(const char *row, ptrdiff_t t, const enum gqa_dtype dtype) {
    row += t * size_of(dtype);
    switch (dtype) {
    case GQA_INT8: return vload_int8(row);
    case GQA_FLOAT16: return vload_float16(row);
    case GQA_BFLOAT16: return vload_bfloat16(row);
    default: return vload((const real *)(const void *)row);
    }
}

/* Kept out of the loops that rarely need it: inlined, it halves their speed. */
static __attribute__((noinline)) vec narrow_rest(const char *from, int bytes, enum gqa_dtype dtype) {
    char part[sizeof(real) * LANES] = {0}; /* more than narrow types need: room for any load */
    for (int i = 0; i < bytes && i < (int)sizeof part; i++) part[i] = from[i];
    return row_vec(part, 0, dtype);
}

/* Its last n elements, n < LANES, and zeros. */
BLOCK vec row_rest(const char *row, ptrdiff_t t, int n, const enum gqa_dtype dtype) {
    row += t * size_of(dtype);
    return dtype == OWN ? vload_n((const real *)(const void *)row, n)
                        : narrow_rest(row, n * (int)size_of(dtype), dtype);
}

BLOCK vec row_some(const char *row, int t, int width, const enum gqa_dtype dtype) {
    return width - t < LANES ? row_rest(row, t, width - t, dtype) : row_vec(row, t, dtype);
}

/* ---- rows to reals ---- */

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

/* What a mask adds for false and for true: looked up, as branches on a random mask are mispredicted. */
static const real mask_adds[] = {-INFINITY, 0};

BLOCK real real_at(const char *from, const enum gqa_dtype dtype, bool swapped) {
    switch (dtype) {
    case GQA_BOOL: return mask_adds[*from != 0];
    case GQA_INT8: return *(const int8_t *)(const void *)from;
    case GQA_FLOAT32: return gqa_float_from_bits((uint32_t)bits_at(from, 4, swapped));
    default: return clamped(gqa_double_from_bits(bits_at(from, 8, swapped)));
    }
}

BLOCK void load_as(real *to, const char *from, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped, int n) {
    for (int i = 0; i < n; i++) to[i] = real_at(from + i * step, dtype, swapped);
}

/* Bools side by side: a choice between two constants, which compilers make of vectors. */
static void load_bools(real *to, const char *from, int n) {
    for (int i = 0; i < n; i++) to[i] = from[i] ? 0 : -INFINITY;
}

BLOCK vec widened(const void *halves, const enum gqa_dtype dtype) {
    return dtype == GQA_FLOAT16 ? vload_float16(halves) : vload_bfloat16(halves);
}

/* At most a vector of halves that do not lie one after another, or do not fill it. */
BLOCK void load_some_halves(real *to, const char *from, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped,
                            int n) {
    uint16_t halves[LANES] = {0};
    real wide[LANES];
    for (int i = 0; i < n; i++) halves[i] = (uint16_t)bits_at(from + i * step, 2, swapped);
    vstore(wide, widened(halves, dtype));
    for (int i = 0; i < n; i++) to[i] = wide[i];
}

BLOCK void load_halves(real *to, const char *from, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped, int n) {
    const bool plain = step == 2 && !swapped;
    int i = 0;
    if (plain)
        for (; n - i >= LANES; i += LANES) vstore(to + i, widened(from + i * step, dtype));
    for (; i < n; i += LANES)
        load_some_halves(to + i, from + i * step, step, dtype, swapped, n - i < LANES ? n - i : LANES);
}

static void load(void *to, const char *from, ptrdiff_t step, enum gqa_dtype dtype, bool swapped, int n) {
    if (dtype == OWN && step == sizeof(real) && !swapped) {
        memcpy(to, from, (size_t)n * sizeof(real));
        return;
    }
    switch (dtype) {
    case GQA_BOOL:
        if (step == 1)
            load_bools(to, from, n);
        else
            load_as(to, from, step, GQA_BOOL, false, n);
        break;
    case GQA_INT8: load_as(to, from, step, GQA_INT8, false, n); break;
    case GQA_FLOAT16: load_halves(to, from, step, GQA_FLOAT16, swapped, n); break;
    case GQA_BFLOAT16: load_halves(to, from, step, GQA_BFLOAT16, swapped, n); break;
    case GQA_FLOAT32: load_as(to, from, step, GQA_FLOAT32, swapped, n); break;
    case GQA_FLOAT64: load_as(to, from, step, GQA_FLOAT64, swapped, n); break;
    case GQA_INT64: break; /* lengths and positions stay integers */
    }
}

/* ---- and back ---- */

BLOCK void put_bits(char *to, uint64_t bits, const size_t size, bool swapped) {
    const uint16_t two = swapped ? __builtin_bswap16((uint16_t)bits) : (uint16_t)bits;
    const uint32_t four = swapped ? __builtin_bswap32((uint32_t)bits) : (uint32_t)bits;
    const uint64_t eight = swapped ? __builtin_bswap64(bits) : bits;
    memcpy(to, size == 2 ? (const void *)&two : size == 4 ? (const void *)&four : (const void *)&eight, size);
}

BLOCK void narrowed(void *halves, const enum gqa_dtype dtype, vec x) {
    if (dtype == GQA_FLOAT16)
        vstore_float16(halves, x);
    else
        vstore_bfloat16(halves, x);
}

/* At most a vector of reals, narrowed together wherever they go. */
BLOCK void store_some_halves(char *to, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped, const real *from,
                             int n) {
    uint16_t halves[LANES];
    real part[LANES] = {0};
    for (int i = 0; i < n; i++) part[i] = from[i];
    narrowed(halves, dtype, vload(part));
    for (int i = 0; i < n; i++) put_bits(to + i * step, halves[i], 2, swapped);
}

BLOCK void store_halves(char *to, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped, const real *from, int n) {
    const bool plain = step == 2 && !swapped;
    int i = 0;
    if (plain)
        for (; n - i >= LANES; i += LANES) narrowed(to + 2 * i, dtype, vload(from + i));
    for (; i < n; i += LANES)
        store_some_halves(to + i * step, step, dtype, swapped, from + i, n - i < LANES ? n - i : LANES);
}

BLOCK void store_as(char *to, ptrdiff_t step, const enum gqa_dtype dtype, bool swapped, const real *from, int n) {
    const size_t size = dtype == GQA_FLOAT32 ? sizeof(float) : sizeof(double);
    for (int i = 0; i < n; i++)
        put_bits(to + i * step, size == sizeof(float) ? gqa_float_bits((float)from[i]) : gqa_double_bits(from[i]), size,
                 swapped);
}

static void store(char *to, ptrdiff_t step, enum gqa_dtype dtype, bool swapped, const void *from, int n) {
    if (dtype == OWN && step == sizeof(real) && !swapped)
        memcpy(to, from, (size_t)n * sizeof(real));
    else if (dtype == GQA_FLOAT16)
        store_halves(to, step, GQA_FLOAT16, swapped, from, n);
    else if (dtype == GQA_BFLOAT16)
        store_halves(to, step, GQA_BFLOAT16, swapped, from, n);
    else if (dtype == GQA_FLOAT32)
        store_as(to, step, GQA_FLOAT32, swapped, from, n);
    else
        store_as(to, step, GQA_FLOAT64, swapped, from, n);
}

static void multiply(void *to, const void *from, int n, double factor) {
    const real by = clamped(factor); /* 1e300 beside floats: 0 times it must stay 0 */
    for (int i = 0; i < n; i++) ((real *)to)[i] = ((const real *)from)[i] * by;
}
