/* cache.c: new rows into a cache, cast to its type on the way.
 *
 * Row by row, by the kernels of its own arithmetic: widened exactly and rounded once.  A row that has the cache's
 * own type is copied.  A task is some rows of one sequence and head.  Called by python/cache.c. */
#include "gqa.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "dispatch.h"
#include "elements.h"
#include "half.h"
#include "numbers.h"
#include "pool.h"

enum {
    STRIP = 512,             /* elements of a row on the stack at a time */
    TASK_ELEMENTS = 1 << 15, /* cast by one task, in some 10 us */
    SMALL_APPEND = 1 << 17,  /* elements below which waking another thread costs more than it gains */
};

/* ---- checks ---- */

static bool store_fits(const struct gqa_array *rows, const struct gqa_array *scales, const struct gqa_array *new_rows) {
    if (rows->ndim != 4 || new_rows->ndim != 4 || !gqa_is_float(new_rows->dtype) || rows->swapped) return false;
    if (rows->shape[1] != new_rows->shape[1] || rows->shape[3] != new_rows->shape[3]) return false;
    if (!scales->data) return gqa_is_float(rows->dtype) && rows->dtype != GQA_FLOAT64;
    return rows->dtype == GQA_INT8 && scales->dtype == GQA_FLOAT32 && !scales->swapped && scales->ndim == 3 &&
           !memcmp(scales->shape, rows->shape, 3 * sizeof *scales->shape);
}

static bool numbers_fit(const struct gqa_array *array, int64_t count) {
    if (array->ndim != 1 || array->shape[0] != count || array->dtype != GQA_INT64 || array->swapped) return false;
    for (int64_t b = 0; b < count; b++)
        if (gqa_integer(array, b, 0) < 0) return false;
    return true;
}

/* Each sequence has room: blocks that the table names, or the slots of a ring, which never run out. */
static bool room_fits(const struct gqa_cache_append *problem, int64_t sequences) {
    const struct gqa_array *table = &problem->block_table;
    const int64_t rows = problem->keys.shape[2];
    for (int64_t b = 0; b < sequences; b++) {
        const int64_t first = gqa_integer(&problem->lengths, b, 0), count = gqa_integer(&problem->counts, b, 0);
        if (count > problem->new_keys.shape[2] || rows < 1) return false;
        if (table->data && !gqa_blocks_fit(table, b, first, first + count, rows, problem->keys.shape[0])) return false;
    }
    return true;
}

static bool append_fits(const struct gqa_cache_append *problem) {
    const struct gqa_array *keys = &problem->keys, *values = &problem->values, *table = &problem->block_table;
    if (!store_fits(keys, &problem->key_scales, &problem->new_keys) ||
        !store_fits(values, &problem->value_scales, &problem->new_values))
        return false;
    const int64_t sequences = problem->new_keys.shape[0];
    if (memcmp(keys->shape, values->shape, 3 * sizeof *keys->shape) ||
        memcmp(problem->new_keys.shape, problem->new_values.shape, 3 * sizeof *keys->shape))
        return false;
    if (table->data ? table->ndim != 2 || table->dtype != GQA_INT64 || table->shape[0] != sequences
                    : keys->shape[0] != sequences)
        return false;
    return numbers_fit(&problem->lengths, sequences) && numbers_fit(&problem->counts, sequences) &&
           room_fits(problem, sequences);
}

/* ---- rows ---- */

struct row {
    char *to;
    const char *from;
    int64_t to_step, from_step, width;
};

/* Elements first to first + count of a row, as reals. */
static void load(const struct gqa_kernels *kernels, void *reals, const struct row *row, const struct gqa_array *from,
                 int64_t first, int64_t count) {
    kernels->load(reals, row->from + first * row->from_step, row->from_step, from->dtype, from->swapped, (int)count);
}

static void cast_row(const struct row *row, const struct gqa_array *to, const struct gqa_array *from) {
    const struct gqa_kernels *kernels = gqa_kernels_for(from->dtype);
    double reals[STRIP]; /* or floats */
    if (to->dtype == from->dtype) {
        gqa_copy_elements(row->to, row->to_step, row->from, row->from_step, row->width, gqa_itemsize(to->dtype),
                          from->swapped);
        return;
    }
    for (int64_t first = 0; first < row->width; first += STRIP) {
        const int64_t count = gqa_min(row->width - first, STRIP);
        load(kernels, reals, row, from, first, count);
        kernels->store(row->to + first * row->to_step, row->to_step, to->dtype, false, reals, (int)count);
    }
}

/* Elements first to first + count of a row, as doubles. */
static void widen(double *x, const struct row *row, const struct gqa_array *from, int64_t first, int64_t count) {
    const struct gqa_kernels *kernels = gqa_kernels_for(from->dtype);
    double reals[STRIP]; /* or floats */
    load(kernels, reals, row, from, first, count);
    gqa_widen(x, (const char *)reals, count, gqa_own_dtype(kernels));
}

/* The largest magnitude of a row; NaN where an element is not finite.  Magnitudes are ordered as their bits are. */
static double magnitude(const struct row *row, const struct gqa_array *from) {
    double x[STRIP];
    uint64_t most = 0;
    for (int64_t first = 0; first < row->width; first += STRIP) {
        const int64_t count = gqa_min(row->width - first, STRIP);
        widen(x, row, from, first, count);
        for (int64_t i = 0; i < count; i++) {
            const uint64_t bits = gqa_double_bits(fabs(x[i]));
            most = bits > most ? bits : most;
        }
    }
    return most < gqa_double_bits(INFINITY) ? gqa_double_from_bits(most) : NAN;
}

/* Rounded up, so that no quotient leaves -127..127 and none is off by more than half a scale. */
static float scale_of(double most) {
    const float scale = (float)(most / 127);
    return (double)scale * 127 < most ? nextafterf(scale, INFINITY) : scale;
}

/* The nearest integer, the even one of two, of a small number: rint is a call where the baseline has no instruction. */
static double nearest(double x) { return x + 0x1.8p52 - 0x1.8p52; }

static float quantise_row(const struct row *row, const struct gqa_array *from) {
    const float scale = scale_of(magnitude(row, from));
    const bool zero = !(scale > 0 && scale < INFINITY); /* nothing but zeros, or NaN by way of the scale */
    double x[STRIP];
    char narrow[STRIP];
    for (int64_t first = 0; first < row->width; first += STRIP) {
        const int64_t count = gqa_min(row->width - first, STRIP);
        widen(x, row, from, first, count);
        for (int64_t i = 0; i < count; i++) narrow[i] = (char)(zero ? 0 : (int)nearest(x[i] / (double)scale));
        for (int64_t i = 0; i < count; i++) row->to[(first + i) * row->to_step] = narrow[i];
    }
    return scale < INFINITY ? scale : NAN;
}

/* ---- the cache ---- */

/* New row i of sequence b and one head, as row `at` of a block. */
static void store_row(const struct gqa_array *rows, const struct gqa_array *scales, const struct gqa_array *from,
                      int64_t b, int64_t head, int64_t i, int64_t block, int64_t at) {
    const struct row row = {
        .to = rows->data + block * rows->strides[0] + head * rows->strides[1] + at * rows->strides[2],
        .from = from->data + b * from->strides[0] + head * from->strides[1] + i * from->strides[2],
        .to_step = rows->strides[3],
        .from_step = from->strides[3],
        .width = rows->shape[3],
    };
    if (!scales->data) {
        cast_row(&row, rows, from);
        return;
    }
    const float scale = quantise_row(&row, from);
    memcpy(scales->data + block * scales->strides[0] + head * scales->strides[1] + at * scales->strides[2], &scale,
           sizeof scale);
}

struct appending {
    const struct gqa_cache_append *problem;
    int64_t rows, parts; /* of a task, and tasks of each sequence and head */
};

/* Of more rows than a ring holds, the last ones stay. */
static int64_t rows_kept(const struct gqa_cache_append *problem, int64_t b) {
    const int64_t count = gqa_integer(&problem->counts, b, 0);
    return problem->block_table.data ? count : gqa_min(count, problem->keys.shape[2]);
}

/* Some rows of one sequence and head. */
static void store_some(const void *context, int64_t index, void *scratch, struct gqa_job *job) {
    const struct appending *appending = context;
    const struct gqa_cache_append *problem = appending->problem;
    const struct gqa_array *table = &problem->block_table;
    const int64_t heads = problem->keys.shape[1], slots = problem->keys.shape[2];
    const int64_t part = index % appending->parts, head = index / appending->parts % heads;
    const int64_t b = index / appending->parts / heads;
    const int64_t first = gqa_integer(&problem->lengths, b, 0), count = gqa_integer(&problem->counts, b, 0);
    int64_t i = count - rows_kept(problem, b) + part * appending->rows;
    const int64_t end = gqa_min(count, i + appending->rows);
    (void)scratch, (void)job; /* a task is short */
    for (; i < end; i++) {
        const int64_t block = table->data ? gqa_integer(table, b, (first + i) / slots) : b, at = (first + i) % slots;
        store_row(&problem->keys, &problem->key_scales, &problem->new_keys, b, head, i, block, at);
        store_row(&problem->values, &problem->value_scales, &problem->new_values, b, head, i, block, at);
    }
}

/* Whether rows that were there before are lost: then nothing may stop halfway. */
static bool overwrites(const struct gqa_cache_append *problem) {
    for (int64_t b = 0; b < problem->new_keys.shape[0] && !problem->block_table.data; b++)
        if (gqa_integer(&problem->lengths, b, 0) + gqa_integer(&problem->counts, b, 0) > problem->keys.shape[2])
            return true;
    return false;
}

enum gqa_status gqa_cache_append_run(const struct gqa_cache_append *problem, struct gqa_poll poll) {
    if (!append_fits(problem)) return GQA_BAD_ARGUMENT;
    const struct gqa_array *new_keys = &problem->new_keys;
    const int64_t width = gqa_max(1, new_keys->shape[3] + problem->new_values.shape[3]);
    struct appending appending = {problem, gqa_max(1, TASK_ELEMENTS / width), 0};
    int64_t most = 0;
    for (int64_t b = 0; b < new_keys->shape[0]; b++) most = gqa_max(most, rows_kept(problem, b));
    appending.parts = gqa_ceil_div(most, appending.rows);
    const int64_t heads = new_keys->shape[0] * new_keys->shape[1];
    const int threads = heads * most * width < SMALL_APPEND ? 1 : gqa_get_num_threads();
    if (overwrites(problem)) poll = (struct gqa_poll){0};
    return gqa_pool_run(store_some, &appending, heads * appending.parts, 0, threads, poll);
}
