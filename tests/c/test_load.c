/* test_load.c: load and store of every table against bits taken apart by hand: every float16 and
 * bfloat16 there is, doubles past float's range, both byte orders, steps of any sign, no alignment. */
#include "kernel_check.h"

#include <stdint.h>

static const size_t sizes[] = {[GQA_FLOAT16] = 2, [GQA_BFLOAT16] = 2, [GQA_FLOAT32] = 4, [GQA_FLOAT64] = 8,
                               [GQA_BOOL] = 1};

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
static void check_load(const uint64_t *bits, int n, enum gqa_dtype dtype, bool swapped, ptrdiff_t step,
                       ptrdiff_t to_stride) {
    const size_t span = (size_t)(n - 1) * (size_t)(step < 0 ? -step : step) + sizes[dtype];
    char *memory = calloc(span + 1, 1);
    if (!memory) exit(3);
    char *first = memory + 1 + (step < 0 ? (ptrdiff_t)(span - sizes[dtype]) : 0);
    for (int i = 0; i < n; i++) lay(first + i * step, bits[i], sizes[dtype], swapped);
    void *to = reals((n - 1) * to_stride + 1, 7);
    kernels->load(to, to_stride, first, step, dtype, swapped, n);
    for (ptrdiff_t i = 0; i <= (n - 1) * to_stride; i++)
        expect("to", i, 0, get(to, i), i % to_stride ? 7 : meaning(bits[i / to_stride], dtype), 0);
    judge("load", n, (int)dtype, swapped, (int)step);
    free(memory), free(to);
}

static void test_every_half(void) {
    enum { ALL = 65536 };
    uint64_t *bits = malloc(ALL * sizeof *bits);
    if (!bits) exit(3);
    for (int i = 0; i < ALL; i++) bits[i] = (uint64_t)i;
    for (int swapped = 0; swapped < 2; swapped++) {
        check_load(bits, ALL, GQA_FLOAT16, swapped, 2, 1);
        check_load(bits, ALL, GQA_BFLOAT16, swapped, 2, 1);
    }
    free(bits);
}

/* Random bits of every dtype, with the values at the edges of float among them. */
static void test_load(void) {
    const double edges[] = {1e300, -1e300, (double)FLT_MAX, 3.5e38, -3.5e38, 1e-320, INFINITY, -INFINITY, NAN, 0.0, -0.0};
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
                    check_load(bits, n, (enum gqa_dtype)dtype, swapped, steps[i], 1 + (n + i) % 3);
            }
}

static void test_store(void) {
    for (int n = 1; n <= 40; n++)
        for (int variant = 0; variant < 8; variant++) {
            const bool swapped = variant & 1;
            const ptrdiff_t size = (ptrdiff_t)kernels->real_size, step = variant & 2 ? size + 3 : size;
            const ptrdiff_t stride = variant & 4 ? 5 : 1;
            void *from = drawn((n - 1) * stride + 1, RANDOM);
            char *memory = calloc((size_t)((n - 1) * step + size + 1), 1), back[sizeof(double)];
            if (!memory) exit(3);
            kernels->store(memory + 1, step, swapped, from, stride, n);
            for (int i = 0; i < n; i++) {
                for (ptrdiff_t b = 0; b < size; b++)
                    back[swapped ? size - 1 - b : b] = memory[1 + i * step + b];
                expect("to", i, 0, get(back, 0), get(from, i * stride), 0);
                for (ptrdiff_t gap = size; gap < step && i < n - 1; gap++)
                    expect("gap", i, gap, memory[1 + i * step + gap], 0, 0);
            }
            judge("store", n, variant, 0, 0);
            free(from), free(memory);
        }
}

static void test_table(void) {
    test_every_half();
    test_load();
    test_store();
}

int main(void) { return on_every_table(test_table); }
