/* narrow_by_one.h: the words for vectors of int8 and of halves in plain C, for vocabularies whose instruction
 * set has none between those and its reals.  Included at their end. */
#include "../half.h"

#include <stdint.h>
#include <string.h>

static inline vec vload_int8(const void *p) {
    int8_t bytes[LANES];
    real x[LANES];
    memcpy(bytes, p, sizeof bytes);
    for (int i = 0; i < LANES; i++) x[i] = bytes[i];
    return vload(x);
}
static inline vec vload_float16(const void *p) {
    uint16_t halves[LANES];
    real x[LANES];
    memcpy(halves, p, sizeof halves);
    for (int i = 0; i < LANES; i++) x[i] = gqa_float16_to_float(halves[i]);
    return vload(x);
}
static inline vec vload_bfloat16(const void *p) {
    uint16_t halves[LANES];
    real x[LANES];
    memcpy(halves, p, sizeof halves);
    for (int i = 0; i < LANES; i++) x[i] = gqa_bfloat16_to_float(halves[i]);
    return vload(x);
}
static inline void vstore_float16(void *p, vec x) {
    uint16_t halves[LANES];
    real part[LANES];
    vstore(part, x);
    for (int i = 0; i < LANES; i++) halves[i] = gqa_double_to_float16((double)part[i]);
    memcpy(p, halves, sizeof halves);
}
static inline void vstore_bfloat16(void *p, vec x) {
    uint16_t halves[LANES];
    real part[LANES];
    vstore(part, x);
    for (int i = 0; i < LANES; i++) halves[i] = gqa_double_to_bfloat16((double)part[i]);
    memcpy(p, halves, sizeof halves);
}
