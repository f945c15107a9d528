/* elements.h: rows of elements between the caller's arrays and packed rows of double.
 *
 * Packed means one after the other in this machine's byte order, of any alignment.
 * Rows never overlap.  Used by convert.c, rope.c, cache.c, check.c and plan.c. */
#ifndef GQA_ELEMENTS_H
#define GQA_ELEMENTS_H

#include "gqa.h"

/* Whether dtype is one of the four kinds of float. */
static inline bool gqa_is_float(enum gqa_dtype dtype) {
    return dtype == GQA_FLOAT16 || dtype == GQA_BFLOAT16 || dtype == GQA_FLOAT32 || dtype == GQA_FLOAT64;
}

size_t gqa_itemsize(enum gqa_dtype dtype);

/* Bit for bit; strides in bytes, of any sign; swap reverses the bytes of each of the
 * elements, whose size is 2, 4 or 8. */
void gqa_copy_elements(char *dst, int64_t dst_stride, const char *src, int64_t src_stride, int64_t length, size_t size,
                       bool swap);

/* x[i] = src[i], exactly; src is packed. */
void gqa_widen(double *restrict x, const char *restrict src, int64_t length, enum gqa_dtype dtype);

/* dst[i] = x[i], rounded once to nearest even; dst is packed. */
void gqa_narrow(char *restrict dst, const double *restrict x, int64_t length, enum gqa_dtype dtype);

#endif
