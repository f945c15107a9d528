/* kernel_check.h: what the programs that test kernels share: every table of the real dispatch in
 * turn, sizes at the edges of vectors and tiles, buffers of reals of either size seen as doubles
 * and exactly as large as kernels.h promises, kinds of values, and verdicts. */
#ifndef KERNEL_CHECK_H
#define KERNEL_CHECK_H

#include "dispatch.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

static const int few_sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 13};
static const int lane_sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 65, 100};
static const int key_sizes[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 64, 100, 127, 128};

static long passed, failed;

/* The table under test, and what the report calls it. */
static const struct gqa_kernels *kernels;
static char table_name[64];

static inline double epsilon(void) { return kernels->real_size == sizeof(float) ? (double)FLT_EPSILON : DBL_EPSILON; }
static inline double tiny(void) { return kernels->real_size == sizeof(float) ? (double)FLT_MIN : DBL_MIN; }

static inline int padded(int n) { return (n + kernels->lanes - 1) / kernels->lanes * kernels->lanes; }
/* As many lanes as a row tile has, at most. */
static inline int tile_lanes(int lanes) { return lanes < kernels->row_tile ? lanes : kernels->row_tile; }

static inline double get(const void *x, ptrdiff_t i) {
    return kernels->real_size == sizeof(float) ? (double)((const float *)x)[i] : ((const double *)x)[i];
}

static inline void put(void *x, ptrdiff_t i, double value) {
    if (kernels->real_size == sizeof(float))
        ((float *)x)[i] = (float)value;
    else
        ((double *)x)[i] = value;
}

/* Exactly count reals, so that a sanitizer sees every step outside. */
static inline void *reals(ptrdiff_t count, double value) {
    void *x = calloc((size_t)(count > 0 ? count : 1), kernels->real_size);
    if (!x) exit(3);
    for (ptrdiff_t i = 0; i < count; i++) put(x, i, value);
    return x;
}

static inline void *copy_of(const void *x, ptrdiff_t count) {
    void *copy = reals(count, 0);
    return memcpy(copy, x, (size_t)count * kernels->real_size);
}

/* ---- values ---- */

enum kind { RANDOM, TINY, DENORMAL, HUGE_VALUES, WITH_ZEROS, KINDS };

static uint64_t chance_state = 88172645463325252u; /* xorshift64 */

static inline double chance(void) { /* in [0, 1) */
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return (double)(chance_state >> 11) / 9007199254740992.0;
}

static inline double value_of(enum kind kind) {
    const double x = 4 * chance() - 2;
    switch (kind) {
    case TINY: return x * pow(tiny(), 0.6);
    case DENORMAL: return x * tiny() / 8;
    case HUGE_VALUES: return x * pow(tiny(), -0.4);
    case WITH_ZEROS: return chance() < 0.3 ? 0 : x;
    default: return x;
    }
}

static inline void *drawn(ptrdiff_t count, enum kind kind) {
    void *x = reals(count, 0);
    for (ptrdiff_t i = 0; i < count; i++) put(x, i, value_of(kind));
    return x;
}

/* ---- verdicts ---- */

static inline bool near(double got, double wanted, double allowed) {
    return isnan(wanted) ? isnan(got) : got == wanted || fabs(got - wanted) <= allowed;
}

/* One verdict for a call; bad says what was wrong first, and stays empty when all was right. */
static char bad[160];

static inline void expect(const char *what, ptrdiff_t i, ptrdiff_t j, double got, double wanted, double allowed) {
    if (!bad[0] && !near(got, wanted, allowed))
        snprintf(bad, sizeof bad, "%s[%td][%td] is %.9g, wanted %.9g within %.3g", what, i, j, got, wanted, allowed);
}

static inline void judge(const char *kernel, int a, int b, int c, int d) {
    if (!bad[0]) {
        passed++;
        return;
    }
    if (failed++ < 40) printf("FAILED %s %s(%d, %d, %d, %d): %s\n", table_name, kernel, a, b, c, d, bad);
    bad[0] = 0;
}

/* The exit status of a program. */
static inline int on_every_table(void (*test)(void)) {
    const char *name;
    for (int isa = 0; (name = gqa_isa_available(isa)); isa++) {
        if (gqa_isa_use(name) != GQA_OK || strcmp(gqa_isa_current(), name)) failed++;
        for (int wide = 0; wide < 2; wide++) {
            kernels = gqa_kernels_for(wide ? GQA_FLOAT64 : GQA_FLOAT32);
            snprintf(table_name, sizeof table_name, "%s %s", name, wide ? "double" : "float");
            test();
        }
    }
    if (gqa_isa_use("none such") != GQA_BAD_ARGUMENT) failed++;
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}

#endif
