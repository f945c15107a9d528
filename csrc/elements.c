/* elements.c: elements on the move, see elements.h. */
#include "elements.h"

#include "half.h"

#include <string.h>

size_t gqa_itemsize(enum gqa_dtype dtype) {
    static const size_t sizes[] = {
        [GQA_FLOAT16] = 2, [GQA_BFLOAT16] = 2, [GQA_FLOAT32] = 4, [GQA_FLOAT64] = 8, [GQA_BOOL] = 1, [GQA_INT8] = 1};
    return sizes[dtype];
}

static inline void copy_sized(char *dst, int64_t dst_stride, const char *src, int64_t src_stride, int64_t length,
                              size_t size, bool swap) {
    for (int64_t i = 0; i < length; i++, dst += dst_stride, src += src_stride)
        for (size_t byte = 0; byte < size; byte++) dst[byte] = src[swap ? size - 1 - byte : byte];
}

void gqa_copy_elements(char *dst, int64_t dst_stride, const char *src, int64_t src_stride, int64_t length, size_t size,
                       bool swap) {
    const bool packed = dst_stride == (int64_t)size && src_stride == (int64_t)size;
    if (packed && !swap)
        memcpy(dst, src, (size_t)length * size);
    else if (size == 2)
        copy_sized(dst, dst_stride, src, src_stride, length, 2, swap);
    else if (size == 4)
        copy_sized(dst, dst_stride, src, src_stride, length, 4, swap);
    else
        copy_sized(dst, dst_stride, src, src_stride, length, 8, swap);
}

void gqa_widen(double *restrict x, const char *restrict src, int64_t length, enum gqa_dtype dtype) {
    uint16_t half;
    float single;
    switch (dtype) {
    case GQA_FLOAT16:
        for (int64_t i = 0; i < length; i++) {
            memcpy(&half, src + 2 * i, sizeof half);
            x[i] = (double)gqa_float16_to_float(half);
        }
        break;
    case GQA_BFLOAT16:
        for (int64_t i = 0; i < length; i++) {
            memcpy(&half, src + 2 * i, sizeof half);
            x[i] = (double)gqa_bfloat16_to_float(half);
        }
        break;
    case GQA_FLOAT32:
        for (int64_t i = 0; i < length; i++) {
            memcpy(&single, src + 4 * i, sizeof single);
            x[i] = (double)single;
        }
        break;
    default: memcpy(x, src, (size_t)length * sizeof *x);
    }
}

void gqa_narrow(char *restrict dst, const double *restrict x, int64_t length, enum gqa_dtype dtype) {
    switch (dtype) {
    case GQA_FLOAT16:
        for (int64_t i = 0; i < length; i++) memcpy(dst + 2 * i, &(uint16_t){gqa_double_to_float16(x[i])}, 2);
        break;
    case GQA_BFLOAT16:
        for (int64_t i = 0; i < length; i++) memcpy(dst + 2 * i, &(uint16_t){gqa_double_to_bfloat16(x[i])}, 2);
        break;
    case GQA_FLOAT32:
        for (int64_t i = 0; i < length; i++) memcpy(dst + 4 * i, &(float){(float)x[i]}, 4);
        break;
    default: memcpy(dst, x, (size_t)length * sizeof *x);
    }
}
