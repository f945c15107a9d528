/* test_convert.c: half precision at every number and tie, and pooling of arrays that lie oddly. */
#include "gqa.h"
#include "half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static int passed, failed;

static void check(bool ok, const char *what)
{
    passed += ok;
    failed += !ok;
    if (!ok)
        printf("failed: %s\n", what);
}

/* ---- half.h ---- */

struct format {
    const char *name;
    float (*widen)(uint16_t half);
    uint16_t (*narrow)(double value);
    uint16_t infinity;
};

/* Every number comes back; between two neighbours the tie goes to the even one, and one ulp beside it decides. */
static void check_format(const struct format *f)
{
    bool same = true, ties = true, beside = true, nan = true;
    for (uint32_t bits = 0; bits < f->infinity; bits++) {
        const uint16_t half = (uint16_t)bits, next = (uint16_t)(bits + 1);
        const double low = f->widen(half), step = low - f->widen((uint16_t)(bits ? bits - 1 : 0));
        const double high = next == f->infinity ? low + step : (double)f->widen(next);
        const double tie = low + (high - low) / 2;
        same &= f->narrow(low) == half && f->narrow(-low) == (uint16_t)(half | 0x8000u);
        ties &= f->narrow(tie) == (bits & 1 ? next : half) && f->narrow(-tie) == (f->narrow(tie) | 0x8000u);
        beside &= f->narrow(nextafter(tie, 0)) == half && f->narrow(nextafter(tie, INFINITY)) == next;
    }
    for (uint32_t bits = f->infinity + 1u; bits < 0x8000; bits++)
        nan &= isnan(f->widen((uint16_t)bits)) && isnan(f->widen(f->narrow(f->widen((uint16_t)bits))));
    check(same, f->name);
    check(ties, f->name);
    check(beside, f->name);
    check(nan, f->name);
    check(f->widen(f->infinity) > 1e4f && isinf(f->widen(f->infinity)), f->name);
    check(f->narrow(INFINITY) == f->infinity && f->narrow(1e300) == f->infinity, f->name);
    check(f->narrow(1e-300) == 0 && f->narrow(-5e-324) == 0x8000, f->name);
}

/* ---- pooling ---- */

enum { HEADS = 6, GROUPS = 2, MEMBERS = 3, HEAD_DIM = 5, COLUMNS = 1030 };

static const int64_t members[GROUPS * MEMBERS] = {4, 0, 2, 1, 5, 3};

static double element(int64_t row, int64_t column) { return (double)((row * 7919 + column * 104729) % 2001 - 1000); }

/* Backwards in both dimensions, with a gap, one byte off alignment, and flush against the end of the block. */
static bool pools_strided_floats(void)
{
    enum { STEP = 12, ROWS = HEADS * HEAD_DIM, BYTES = STEP * (ROWS * COLUMNS - 1) + 4 };
    char *block = malloc(BYTES + 1);
    float *out = malloc(sizeof *out * GROUPS * HEAD_DIM * COLUMNS);
    if (!block || !out)
        return false;
    char *first = block + 1 + BYTES - 4;
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t column = 0; column < COLUMNS; column++)
            memcpy(first - STEP * (row * COLUMNS + column), &(float){(float)element(row, column)}, 4);
    struct gqa_pool_heads problem = {
        .weight = {first, GQA_FLOAT32, false, 2, {ROWS, COLUMNS}, {-STEP * COLUMNS, -STEP}},
        .out = {(char *)out, GQA_FLOAT32, false, 2, {GROUPS * HEAD_DIM, COLUMNS}, {4 * COLUMNS, 4}},
        .num_heads = HEADS, .num_kv_heads = GROUPS, .members_per_head = MEMBERS, .members = members};
    bool ok = gqa_pool_heads_run(&problem, (struct gqa_poll){0}) == GQA_OK;
    for (int64_t row = 0; row < GROUPS * HEAD_DIM; row++)
        for (int64_t column = 0; column < COLUMNS; column++) {
            double sum = 0;
            for (int64_t m = 0; m < MEMBERS; m++)
                sum += element(members[row / HEAD_DIM * MEMBERS + m] * HEAD_DIM + row % HEAD_DIM, column);
            ok &= out[row * COLUMNS + column] == (float)(sum / MEMBERS);
        }
    free(block);
    free(out);
    return ok;
}

/* The mean 2049 + 2^-26 lies above a tie of float16 by less than float32 can tell. */
static bool pools_halves_in_one_rounding(void)
{
    const uint16_t weight[4] = {0x7000, 0x4400, 0x0001, 0x0000}; /* 8192, 4, 2^-24, 0 */
    const int64_t all[4] = {0, 1, 2, 3};
    uint16_t out = 0;
    struct gqa_pool_heads problem = {
        .weight = {(char *)(uintptr_t)weight, GQA_FLOAT16, false, 1, {4}, {2}},
        .out = {(char *)&out, GQA_FLOAT16, false, 1, {1}, {2}},
        .num_heads = 4, .num_kv_heads = 1, .members_per_head = 4, .members = all};
    return gqa_pool_heads_run(&problem, (struct gqa_poll){0}) == GQA_OK && gqa_float16_to_float(out) == 2050;
}

static bool refuses(struct gqa_pool_heads problem)
{
    return gqa_pool_heads_run(&problem, (struct gqa_poll){0}) == GQA_BAD_ARGUMENT;
}

static void check_refusals(void)
{
    double data[4] = {0};
    const double none[2] = {1, -1};
    struct gqa_pool_heads good = {
        .weight = {(char *)data, GQA_FLOAT64, false, 1, {2}, {8}},
        .out = {(char *)(data + 2), GQA_FLOAT64, false, 1, {1}, {8}},
        .num_heads = 2, .num_kv_heads = 1, .members_per_head = 2, .members = (const int64_t[]){0, 1}};
    check(gqa_pool_heads_run(&good, (struct gqa_poll){0}) == GQA_OK, "a good problem runs");
    struct gqa_pool_heads bad = good;
    bad.axis = 1;
    check(refuses(bad), "axis");
    bad = good, bad.out.dtype = GQA_FLOAT32;
    check(refuses(bad), "dtype of out");
    bad = good, bad.out.shape[0] = 2;
    check(refuses(bad), "shape of out");
    bad = good, bad.num_heads = 3;
    check(refuses(bad), "num_heads");
    bad = good, bad.members = (const int64_t[]){0, 2};
    check(refuses(bad), "a member that is no head");
    bad = good, bad.weights = none;
    check(refuses(bad), "weights that sum to 0");
}

int main(void)
{
    check_format(&(struct format){"float16", gqa_float16_to_float, gqa_double_to_float16, 0x7c00});
    check_format(&(struct format){"bfloat16", gqa_bfloat16_to_float, gqa_double_to_bfloat16, 0x7f80});
    check(pools_strided_floats(), "strided floats");
    check(pools_halves_in_one_rounding(), "one rounding");
    check_refusals();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
