/* test_load.c: load and store of every table against bits taken apart by hand: every float16 and
 * bfloat16 there is, the midpoint between any two and the reals beside it, doubles past float's range,
 * both byte orders, steps of any sign, no alignment. */
#include "kernel_check.h"

#include <stdint.h>

static const size_t sizes[] = {
    [GQA_FLOAT16] = 2, [GQA_BFLOAT16] = 2, [GQA_FLOAT32] = 4, [GQA_FLOAT64] = 8, [GQA_BOOL] = 1};

/* What bits mean: sign, exponent and fraction as IEEE 754 puts them. */
static double decoded(uint64_t bits, int exponent_bits, int fraction_bits) {
    const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1 : 1;
    const int exponent = (int)(bits >> fraction_bits & ((UINT64_C(1) << exponent_bits) - 1));
    const double fraction = ldexp((double)(bits & ((UINT64_C(1) << fraction_bits) - 1)), -fraction_bits);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    if (exponent == (1 << exponent_bits) - 1) return fraction > 0 ? NAN : sign * INFINITY;
    return exponent ? sign * ldexp(1 + fraction, exponent - bias) : sign * ldexp(fraction, 1 - bias);
}

/* The real that a table is to make of an element. */
static double meaning(uint64_t bits, enum gqa_dtype dtype) {
    switch (dtype) {
    case GQA_BOOL: return bits ? 0 : -INFINITY;
    case GQA_FLOAT16: return decoded(bits, 5, 10);
    case GQA_BFLOAT16: return decoded(bits, 8, 7);
    case GQA_FLOAT32: return decoded(bits, 8, 23);
    default: break;
    }
    const double x = decoded(bits, 11, 52), most = kernels->real_size == sizeof(float) ? (double)FLT_MAX : DBL_MAX;
    if (isfinite(x) && fabs(x) > most) return copysign(most, x);
    return kernels->real_size == sizeof(float) ? (double)(float)x : x;
}

static void lay(char *to, uint64_t bits, size_t size, bool swapped) {
    const uint16_t probe = 1;
    unsigned char low_first;
    memcpy(&low_first, &probe, 1);
    for (size_t i = 0; i < size; i++) to[low_first != swapped ? i : size - 1 - i] = (char)(bits >> 8 * i);
}

/* n elements, step bytes apart from the first on, one byte past any alignment. */
static void check_load(const uint64_t *bits, int n, enum gqa_dtype dtype, bool swapped, ptrdiff_t step) {
    const size_t span = (size_t)(n - 1) * (size_t)(step < 0 ? -step : step) + sizes[dtype];
    char *memory = calloc(span + 1, 1);
    if (!memory) exit(3);
    char *first = memory + 1 + (step < 0 ? (ptrdiff_t)(span - sizes[dtype]) : 0);
    for (int i = 0; i < n; i++) lay(first + i * step, bits[i], sizes[dtype], swapped);
    void *to = reals(n + 1, 7);
    kernels->load(to, first, step, dtype, swapped, n);
    for (int i = 0; i <= n; i++) expect("to", i, 0, get(to, i), i < n ? meaning(bits[i], dtype) : 7, 0);
    judge("load", n, (int)dtype, swapped, (int)step);
    free(memory), free(to);
}

static void test_every_half(void) {
    enum { ALL = 65536 };
    uint64_t *bits = malloc(ALL * sizeof *bits);
    if (!bits) exit(3);
    for (int i = 0; i < ALL; i++) bits[i] = (uint64_t)i;
    for (int dtype = GQA_FLOAT16; dtype <= GQA_BFLOAT16; dtype++)
        for (int swapped = 0; swapped < 2; swapped++) {
            check_load(bits, ALL, (enum gqa_dtype)dtype, swapped, 2);
            check_load(bits, ALL, (enum gqa_dtype)dtype, swapped, -2);
            check_load(bits, ALL, (enum gqa_dtype)dtype, swapped, 5);
        }
    free(bits);
}

/* Random bits of every dtype, with the values at the edges of float among them. */
static void test_load(void) {
    const double edges[] = {1e300, -1e300, (double)FLT_MAX, 3.5e38, -3.5e38, 1e-320, INFINITY, -INFINITY, NAN,
                            0.0,   -0.0};
    uint64_t bits[40];
    for (int n = 1; n <= 40; n++)
        for (int dtype = GQA_FLOAT16; dtype <= GQA_BOOL; dtype++)
            for (int swapped = 0; swapped < 2; swapped++) {
                for (int i = 0; i < n; i++) {
                    chance();
                    bits[i] = chance_state >> (64 - 8 * sizes[dtype]);
                    if (dtype == GQA_BOOL) bits[i] &= 1;
                    if (dtype == GQA_FLOAT64 && i % 2) memcpy(&bits[i], &edges[(i + n) % 11], sizeof *edges);
                }
                const ptrdiff_t size = (ptrdiff_t)sizes[dtype], steps[] = {size, -size, 3 * size, size + 1, 0};
                for (int i = 0; i < (n == 1 ? 5 : 4); i++)
                    check_load(bits, n, (enum gqa_dtype)dtype, swapped, steps[i]);
            }
}

/* The bits of x as a float or double. */
static uint64_t bits_of(double x, enum gqa_dtype dtype) {
    const float single = (float)x;
    uint32_t narrow;
    uint64_t wide;
    memcpy(&narrow, &single, sizeof narrow);
    memcpy(&wide, &x, sizeof wide);
    return dtype == GQA_FLOAT32 ? narrow : wide;
}

/* Elements wanted[i], as their bits; NaN wants any NaN. */
static void check_store(const void *from, const uint64_t *wanted, int n, enum gqa_dtype dtype, bool swapped,
                        ptrdiff_t step) {
    const ptrdiff_t size = (ptrdiff_t)sizes[dtype];
    const size_t span = (size_t)(n - 1) * (size_t)(step < 0 ? -step : step) + sizes[dtype];
    char *memory = calloc(span + 1, 1), *first = memory + 1 + (step < 0 ? (ptrdiff_t)span - size : 0);
    if (!memory) exit(3);
    kernels->store(first, step, dtype, swapped, from, n);
    for (int i = 0; i < n; i++) {
        char element[16]; /* gcc 12 fears that lay writes a vector */
        lay(element, wanted[i], sizes[dtype], swapped);
        if (isnan(meaning(wanted[i], dtype))) {
            kernels->load(element, first + i * step, 0, dtype, swapped, 1);
            expect("NaN", i, 0, get(element, 0), NAN, 0);
        } else
            expect("bits", i, 0, memcmp(first + i * step, element, sizes[dtype]), 0, 0);
        for (ptrdiff_t gap = size; gap < step && i < n - 1; gap++) expect("gap", i, gap, first[i * step + gap], 0, 0);
    }
    judge("store", n, (int)dtype, swapped, (int)step);
    free(memory);
}

/* Reals at and about half number i of the 32768 without sign, and the bits that each becomes: itself,
 * the middle between it and the next, which goes to the even one, and the reals beside the middle. */
enum { ABOUT = 4 };

static void about_half(int i, enum gqa_dtype dtype, double x[ABOUT], uint64_t bits[ABOUT]) {
    const uint64_t half = (uint64_t)i, infinity = dtype == GQA_FLOAT16 ? 0x7c00 : 0x7f80;
    const double here = meaning(half, dtype), sign = i % 3 ? 1 : -1;
    double next = meaning(half + 1, dtype); /* rounding sees infinity as the number after the largest */
    if (half + 1 == infinity) next = ldexp(1, dtype == GQA_FLOAT16 ? 16 : 128);
    const double middle = half < infinity ? (here + next) / 2 : here;
    const bool wide = kernels->real_size == sizeof(double);
    const double reals_about[ABOUT] = {here, wide ? nextafter(middle, 0) : (double)nextafterf((float)middle, 0), middle,
                                       wide ? nextafter(middle, 1e300) : (double)nextafterf((float)middle, INFINITY)};
    const uint64_t bits_about[ABOUT] = {half, half, half + (half & 1), half + 1};
    for (int k = 0; k < ABOUT; k++) {
        x[k] = copysign(half < infinity ? reals_about[k] : here, sign);
        bits[k] = (half < infinity ? bits_about[k] : half) | (sign < 0 ? 0x8000 : 0);
    }
}

static void test_every_rounding(void) {
    enum { ALL = 32768 * ABOUT };
    uint64_t *bits = malloc(ALL * sizeof *bits);
    void *from = reals(ALL, 0);
    if (!bits) exit(3);
    for (int dtype = GQA_FLOAT16; dtype <= GQA_BFLOAT16; dtype++) {
        for (int i = 0; i < ALL; i += ABOUT) {
            double x[ABOUT];
            about_half(i / ABOUT, (enum gqa_dtype)dtype, x, bits + i);
            for (int k = 0; k < ABOUT; k++) put(from, i + k, x[k]);
        }
        for (int swapped = 0; swapped < 2; swapped++) check_store(from, bits, ALL, (enum gqa_dtype)dtype, swapped, 2);
    }
    free(bits), free(from);
}

/* Every length and step, to every float dtype. */
static void test_store(void) {
    const enum gqa_dtype dtypes[] = {GQA_FLOAT16, GQA_BFLOAT16, GQA_FLOAT32, GQA_FLOAT64};
    for (int n = 1; n <= 40; n++)
        for (int variant = 0; variant < 48; variant++) {
            const enum gqa_dtype dtype = dtypes[variant / 12];
            const bool half = variant / 12 < 2;
            const ptrdiff_t size = (ptrdiff_t)sizes[dtype], steps[] = {size, size + 3, -size};
            uint64_t bits[40];
            void *from = drawn(n, RANDOM);
            for (int i = 0; i < n; i++) {
                double x[ABOUT];
                uint64_t about[ABOUT];
                about_half((int)(32768 * chance()), half ? dtype : GQA_FLOAT16, x, about);
                if (half) put(from, i, x[i % ABOUT]);
                bits[i] = half ? about[i % ABOUT] : bits_of(get(from, i), dtype);
            }
            check_store(from, bits, n, dtype, variant & 1, steps[variant / 4 % 3]);
            free(from);
        }
}

static void test_table(void) {
    test_every_half();
    test_load();
    test_every_rounding();
    test_store();
}

int main(void) { return on_every_table(test_table); }
