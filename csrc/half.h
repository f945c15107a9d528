/* half.h: float16 and bfloat16, one number at a time, in integer arithmetic.
 *
 * Widening is exact.  Narrowing rounds a double once, to nearest even, straight to
 * the half: by way of float it would round twice and break ties the wrong way.
 * Subnormals, infinities and the sign of zero are right; a NaN stays a NaN, quiet,
 * with the top of its payload.  No branch depends on the value but for NaN, so
 * loops over these functions vectorise.
 * Used by convert.c, elements.c, cache.c and load_tmpl.h. */
#ifndef GQA_HALF_H
#define GQA_HALF_H

#include <stdint.h>
#include <string.h>

static inline float gqa_float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t gqa_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint64_t gqa_double_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double gqa_double_from_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float gqa_bfloat16_to_float(uint16_t half) { return gqa_float_from_bits((uint32_t)half << 16); }

static inline float gqa_float16_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t shifted = (uint32_t)(half & 0x7fffu) << 13;
    /* Exponent bias 15 becomes 127; the all-ones exponent of inf and NaN stays all ones. */
    const uint32_t normal = shifted + (shifted < 0x0f800000u ? 0x38000000u : 0x70000000u);
    /* A subnormal is put on top of 2^-14 and this is taken away again: exact, and no slow float subnormal. */
    const uint32_t subnormal = gqa_float_bits(gqa_float_from_bits(shifted + 0x38800000u) - 0x1p-14f);
    const uint32_t chosen = 0u - (uint32_t)(shifted < 0x00800000u);
    return gqa_float_from_bits((subnormal & chosen) | (normal & ~chosen) | sign);
}

/* A 16-bit format is a sign, an exponent with the given bias, and fraction_bits. */
static inline uint16_t gqa_narrow_to_half(double value, int fraction_bits, int bias) {
    const uint64_t bits = gqa_double_bits(value);
    const uint64_t sign = (bits >> 63) << 15;
    const uint64_t magnitude = bits & ~(UINT64_C(1) << 63);
    const uint64_t infinity = 0x7fffu >> fraction_bits << fraction_bits;
    if (magnitude > UINT64_C(0x7ff) << 52) {
        const uint64_t payload = magnitude >> (52 - fraction_bits) & ~infinity & 0x7fffu;
        return (uint16_t)(sign | infinity | UINT64_C(1) << (fraction_bits - 1) | payload);
    }
    const int exponent = (int)(magnitude >> 52) - 1023 + bias;
    const int below_normal = exponent < 1 ? 1 - exponent : 0;
    /* Dropping 54 of 53 significant bits already rounds everything to zero. */
    const int drop = 52 - fraction_bits + below_normal < 54 ? 52 - fraction_bits + below_normal : 54;
    const uint64_t significand = (magnitude & ((UINT64_C(1) << 52) - 1)) | UINT64_C(1) << 52;
    const uint64_t odd = significand >> drop & 1;
    const uint64_t rounded = (significand + (UINT64_C(1) << (drop - 1)) - 1 + odd) >> drop;
    /* The implicit bit adds one to the exponent, a carry out of the fraction another one. */
    const uint64_t result = ((uint64_t)(exponent + below_normal - 1) << fraction_bits) + rounded;
    return (uint16_t)(sign | (result < infinity ? result : infinity));
}

static inline uint16_t gqa_double_to_float16(double value) { return gqa_narrow_to_half(value, 10, 15); }

static inline uint16_t gqa_double_to_bfloat16(double value) { return gqa_narrow_to_half(value, 7, 127); }

#endif
