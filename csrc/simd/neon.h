/* neon.h: the vocabulary in AArch64 NEON words, 4 floats a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f32.h"

enum { LANES = 4, ROW_TILE = 24, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 8,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 2,
    DOT_ROWS = 4
}; /* blocks that fit the registers */
enum { OWN_ALONE = 2, NARROW_ALONE = 0 }; /* rows that take keys one by one: see dot_keys */

typedef float32x4_t vec;
typedef uint32x4_t mask;

static inline vec vset(real x) { return vdupq_n_f32(x); }
static inline vec viota(void) { return (vec){0, 1, 2, 3}; }
static inline vec vload(const real *p) { return vld1q_f32(p); }
static inline vec vload_n(const real *p, int n) {
    real part[4] = {p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0};
    return vld1q_f32(part);
}
static inline void vstore(real *p, vec x) { vst1q_f32(p, x); }

static inline vec vadd(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec vsub(vec a, vec b) { return vsubq_f32(a, b); }
static inline vec vmul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec vdiv(vec a, vec b) { return vdivq_f32(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec vmax(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return vcltq_f32(a, b); }
static inline mask veq(vec a, vec b) { return vceqq_f32(a, b); }
static inline vec vselect(mask m, vec a, vec b) { return vbslq_f32(m, a, b); }

static inline vec vzip_low(vec a, vec b) { return vzip1q_f32(a, b); } /* a0 b0 a1 b1 ...: the lower half of both */
static inline vec vzip_high(vec a, vec b) { return vzip2q_f32(a, b); }

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23));
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

/* A vector of int8 or of halves from and to memory of any alignment; stores round to nearest even. */
static inline vec vload_int8(const void *p) {
    int8x8_t bytes = vreinterpret_s8_u32(vld1_lane_u32(p, vdup_n_u32(0), 0));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
static inline vec vload_float16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
static inline vec vload_bfloat16(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
static inline void vstore_float16(void *p, vec x) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(x))); }
static inline void vstore_bfloat16(void *p, vec x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    vst1_u8(p, vreinterpret_u8_u16(vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16)));
}
