/* test_pairs.c: products of bfloat16 by pairs against a plain loop in double, of the tables that have them.
 *
 * Built and run as test_kernels.c is. */
#include "kernel_check.h"

/* count bfloat16 at an odd number of bytes from anything aligned, and what they are. */
static char *draw(ptrdiff_t count, enum kind kind, double **values) {
    char *memory = malloc((size_t)count * 2 + 1);
    *values = malloc((size_t)count * sizeof(double));
    if (!memory || !*values) exit(3);
    for (ptrdiff_t i = 0; i < count; i++) {
        void *x = reals(1, value_of(kind));
        kernels->store(memory + 1 + 2 * i, 2, GQA_BFLOAT16, false, x, 1);
        kernels->load(x, memory + 1 + 2 * i, 2, GQA_BFLOAT16, false, 1);
        (*values)[i] = get(x, 0);
        free(x);
    }
    return memory;
}

static double product(const double *x, const double *y, int width, double *size) {
    double sum = *size = 0;
    for (int t = 0; t < width; t++) {
        const double term = fabs(x[t]) < tiny() || fabs(y[t]) < tiny() ? 0 : x[t] * y[t];
        sum += term;
        *size += fabs(term);
    }
    return sum;
}

static double allowed(int width, double size, double scale) {
    return (width + 4) * fabs(scale) * (epsilon() * size + tiny());
}

static void test_dot_of(int rows, int keys, int head_dim, enum kind kind, double scale) {
    const ptrdiff_t q_stride = (head_dim + 2 * kernels->lanes - 1) / (2 * kernels->lanes) * 2 * kernels->lanes;
    const ptrdiff_t k_stride = head_dim + 1;
    double *q_values, *k_values, size;
    char *drawn_q = draw(rows * head_dim, kind, &q_values);
    char *k = draw((keys - 1) * k_stride + head_dim, kind, &k_values), *q = calloc((size_t)(rows * q_stride), 2);
    void *s = reals(rows * GQA_KEY_TILE, 7e7);
    if (!q) exit(3);
    for (int r = 0; r < rows; r++) memcpy(q + r * q_stride * 2, drawn_q + 1 + r * head_dim * 2, (size_t)head_dim * 2);
    kernels->dot_pairs(s, scale, q, q_stride, rows, k + 1, k_stride, keys, head_dim, 0);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < GQA_KEY_TILE; j++) {
            if (j >= keys && j < (keys + 3) / 4 * 4) continue; /* anything may stand there */
            double wanted = 7e7;
            size = 0;
            if (j < keys) wanted = scale * product(q_values + r * head_dim, k_values + j * k_stride, head_dim, &size);
            expect("s", r, j, get(s, r * GQA_KEY_TILE + j), wanted, j < keys ? allowed(head_dim, size, scale) : 0);
        }
    judge("dot_pairs", rows, keys, head_dim, (int)kind);
    free(drawn_q), free(k), free(q), free(s), free(q_values), free(k_values);
}

/* q lies in lanes, pair after pair. */
static void test_outer_of(int lanes, int keys, int head_dim, enum kind kind, double scale) {
    const bool whole = kernels->whole_pairs;
    const ptrdiff_t k_stride = whole ? 2 * padded(head_dim / 2) : head_dim + 3, c_stride = kernels->row_tile;
    double *q_values, *k_values, size;
    char *drawn_q = draw((ptrdiff_t)lanes * head_dim, kind, &q_values);
    char *k = draw((keys - 1) * k_stride + head_dim, kind, &k_values);
    char *q = calloc((size_t)(c_stride * (whole ? padded(head_dim / 2) : head_dim / 2)), 4);
    char *k_whole = aligned_alloc(64, (size_t)(keys * k_stride * 2 + 63) / 64 * 64);
    void *c = reals(keys * c_stride, 7e7);
    if (!q || !k_whole) exit(3);
    memset(k_whole, 0, (size_t)(keys * k_stride * 2));
    for (int j = 0; j < keys; j++) memcpy(k_whole + j * k_stride * 2, k + 1 + j * k_stride * 2, (size_t)head_dim * 2);
    for (int lane = 0; lane < lanes; lane++)
        for (int t = 0; t < head_dim / 2; t++)
            memcpy(q + (t * c_stride + lane) * 4, drawn_q + 1 + (lane * head_dim + 2 * t) * 2, 4);
    kernels->outer_pairs(c, scale, q, lanes, whole ? k_whole : k + 1, k_stride, keys, head_dim / 2);
    for (int j = 0; j < keys; j++)
        for (int lane = 0; lane < (int)c_stride; lane++) {
            double wanted = 7e7;
            size = 0;
            if (lane < lanes)
                wanted =
                    scale * product(q_values + (ptrdiff_t)lane * head_dim, k_values + j * k_stride, head_dim, &size);
            expect("c", j, lane, get(c, j * c_stride + lane), wanted,
                   lane < lanes ? allowed(head_dim, size, scale) : 0);
        }
    judge("outer_pairs", lanes, keys, head_dim, (int)kind);
    free(drawn_q), free(k), free(k_whole), free(q), free(c), free(q_values), free(k_values);
}

static uint16_t turned_bits(const char *turned, int d, int t) {
    uint16_t bits;
    memcpy(&bits, turned + (d * GQA_TURNED + t) * 2, sizeof bits);
    return bits;
}

/* Values key beside key; one of every three is not finite where told so. */
static char *turn_values(const char *v, ptrdiff_t v_stride, int keys, int width, bool finite) {
    char *turned = malloc((size_t)(padded(width) * GQA_TURNED * 2));
    if (!turned) exit(3);
    memset(turned, 0xff, (size_t)(padded(width) * GQA_TURNED * 2));
    if (kernels->turn_pairs(turned, v, v_stride, keys, width) != finite) expect("finite", 0, 0, !finite, finite, 0);
    for (int d = 0; d < padded(width); d++)
        for (int t = 0; t < GQA_TURNED; t++) {
            uint16_t wanted = 0;
            if (d < width && t < keys) memcpy(&wanted, v + (t * v_stride + d) * 2, 2);
            if ((wanted & 0x7f80) == 0x7f80) wanted = 0;
            expect("turned", d, t, turned_bits(turned, d, t), wanted, 0);
        }
    return turned;
}

static void test_weigh_of(int lanes, int keys, int width, enum kind kind, bool finite) {
    const ptrdiff_t v_stride = width + 3, c_stride = kernels->row_tile;
    double *v_values;
    char *v = draw((keys - 1) * v_stride + width, kind, &v_values);
    const uint16_t not_finite[] = {0x7f80, 0xff80, 0x7fc0};
    for (int t = 0; t < keys && !finite; t += 3) {
        memcpy(v + 1 + (t * v_stride + t % width) * 2, &not_finite[t % COUNT(not_finite)], 2);
        v_values[t * v_stride + t % width] = 0;
    }
    char *turned = turn_values(v + 1, v_stride, keys, width, finite);
    void *c = drawn(width * c_stride, RANDOM), *before = copy_of(c, width * c_stride), *scale = drawn(c_stride, RANDOM);
    void *s = reals(keys * c_stride, 0);
    for (ptrdiff_t i = 0; i < keys * c_stride; i++) put(s, i, chance() < 0.2 ? 0 : chance());
    kernels->weigh_pairs(c, scale, s, lanes, turned, width, keys);
    for (int d = 0; d < width; d++)
        for (int lane = 0; lane < (int)c_stride; lane++) {
            double wanted = get(before, d * c_stride + lane), size = 0;
            if (lane < lanes) wanted *= get(scale, lane), size = fabs(wanted);
            for (int t = 0; t < keys && lane < lanes; t++) {
                const double value = v_values[t * v_stride + d];
                const double term = fabs(value) < tiny() ? 0 : get(s, t * c_stride + lane) * value;
                wanted += term, size += fabs(term);
            }
            expect("c", d, lane, get(c, d * c_stride + lane), wanted, (keys + 4) * (epsilon() * size + tiny()));
        }
    judge("weigh_pairs", lanes, keys, width, (int)kind);
    free(v), free(v_values), free(turned), free(c), free(before), free(scale), free(s);
}

static void test_table(void) {
    static const int head_dims[] = {2, 4, 14, 16, 30, 32, 34, 62, 64, 66, 128, 130};
    if (!kernels->outer_pairs) return;
    for (int i = 0; i < COUNT(head_dims); i++)
        for (int j = 0; j < COUNT(key_sizes); j++) {
            const enum kind kind = (enum kind)((i + j) % KINDS);
            const int rows = few_sizes[(i + j) % COUNT(few_sizes)];
            const int lanes = tile_lanes(padded(lane_sizes[(i + 2 * j) % COUNT(lane_sizes)]));
            if (kernels->dot_pairs) test_dot_of(rows, key_sizes[j], head_dims[i], kind, j % 2 ? 0.125 : -0.3);
            test_outer_of(lanes, key_sizes[j], head_dims[i], kind, j % 2 ? 0.125 : -0.3);
            if (kernels->weigh_pairs) test_weigh_of(lanes, key_sizes[j], head_dims[i] - i % 2, kind, j % 4 != 3);
        }
}

int main(void) {
    passed++; /* where no CPU has pairs there is nothing else to count */
    return on_every_table(test_table);
}
