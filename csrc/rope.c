/* rope.c: rotary position embedding (Su et al., arXiv:2104.09864), in place on the caller's arrays.
 *
 * Rows that stand at the same position share one cosine and sine for each pair: the
 * dimensions in which positions differ are walked outside, those in which they do
 * not (heads, most often) inside.  A unit of work is BLOCK rows of a sequence in up to
 * SHARERS of those that share their positions; a task is some units.  Angles and turning
 * are in double, and a result is rounded once, so no thread or layout changes a bit.
 * Called by python/rope.c. */
#include "elements.h"
#include "gqa.h"
#include "numbers.h"
#include "pool.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK = 16,              /* rows whose cosines and sines stay in L1 */
    SHARERS = 256,           /* then making these is a few per cent of the work */
    TASK_ELEMENTS = 1 << 14, /* turned by one task, in some 10 us */
};

/* Dimensions of x walked as one index, and where a step in each leads; strides in bytes. */
struct walk {
    int ndim;
    int64_t count;
    struct {
        int64_t length, x, out, positions;
    } dims[GQA_MAX_DIMS];
};

struct place {
    const char *x;
    char *out;
    int64_t positions; /* bytes from the first one */
};

struct turning {
    const struct gqa_rope *problem;
    size_t itemsize;
    int64_t position_stride; /* along the sequence */
    struct walk own, shared; /* leading dimensions: each index with positions of its own, or not */
    int64_t blocks, parts;   /* of one sequence, and of those that share its positions */
    int64_t units, units_per_task;
};

/* A task's scratch: BLOCK rows of cosines, as many of sines, and three rows of 2 * pairs. */
struct buffers {
    double *cosines, *sines, *x, *turned;
    char *plain; /* elements packed, native byte order */
};

static struct buffers cut_scratch(void *scratch, int64_t pairs) {
    double *at = scratch;
    return (struct buffers){at, at + BLOCK * pairs, at + 2 * BLOCK * pairs, at + 2 * (BLOCK + 1) * pairs,
                            (char *)(at + 2 * (BLOCK + 2) * pairs)};
}

static size_t scratch_bytes(int64_t pairs) { return (size_t)(2 * (BLOCK + 3) * pairs) * sizeof(double); }

/* ---- one row ---- */

static void find_angles(const struct gqa_rope *problem, int64_t position, double *cosines, double *sines) {
    for (int64_t i = 0; i < problem->pairs; i++) {
        const double angle = (double)position * problem->frequencies[i];
        cosines[i] = problem->scale * cos(angle);
        sines[i] = problem->scale * sin(angle);
    }
}

/* Element i goes with element i + pairs. */
static void turn_halves(double *restrict out, const double *restrict x, const double *restrict cosines,
                        const double *restrict sines, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        out[i] = x[i] * cosines[i] - x[pairs + i] * sines[i];
        out[pairs + i] = x[pairs + i] * cosines[i] + x[i] * sines[i];
    }
}

/* Element 2 i goes with element 2 i + 1. */
static void turn_neighbours(double *restrict out, const double *restrict x, const double *restrict cosines,
                            const double *restrict sines, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        out[2 * i] = x[2 * i] * cosines[i] - x[2 * i + 1] * sines[i];
        out[2 * i + 1] = x[2 * i + 1] * cosines[i] + x[2 * i] * sines[i];
    }
}

static void turn_row(const struct turning *t, const struct place *at, const double *cosines, const double *sines,
                     const struct buffers *b) {
    const struct gqa_array *x = &t->problem->x, *out = &t->problem->out;
    const int64_t pairs = t->problem->pairs, size = (int64_t)t->itemsize;
    const int64_t x_stride = x->strides[x->ndim - 1], out_stride = out->strides[out->ndim - 1];
    const int64_t rest = x->shape[x->ndim - 1] - 2 * pairs;
    const bool x_plain = x_stride == size && !x->swapped, out_plain = out_stride == size && !out->swapped;
    if (!x_plain) gqa_copy_elements(b->plain, size, at->x, x_stride, 2 * pairs, t->itemsize, x->swapped);
    gqa_widen(b->x, x_plain ? at->x : b->plain, 2 * pairs, x->dtype);
    (t->problem->interleaved ? turn_neighbours : turn_halves)(b->turned, b->x, cosines, sines, pairs);
    gqa_narrow(out_plain ? at->out : b->plain, b->turned, 2 * pairs, x->dtype);
    if (!out_plain) gqa_copy_elements(at->out, out_stride, b->plain, size, 2 * pairs, t->itemsize, out->swapped);
    if (rest && at->x != at->out)
        gqa_copy_elements(at->out + 2 * pairs * out_stride, out_stride, at->x + 2 * pairs * x_stride, x_stride, rest,
                          t->itemsize, x->swapped != out->swapped);
}

/* ---- all rows ---- */

static struct place step(const struct walk *walk, struct place at, int64_t index) {
    for (int d = walk->ndim - 1; d >= 0; d--) {
        const int64_t i = index % walk->dims[d].length;
        index /= walk->dims[d].length;
        at.x += i * walk->dims[d].x;
        at.out += i * walk->dims[d].out;
        at.positions += i * walk->dims[d].positions;
    }
    return at;
}

/* Of a row of the sequence whose first position lies at this place. */
static int64_t position_of(const struct turning *t, const struct place *sequence, int64_t row) {
    const char *positions = t->problem->positions.data;
    int64_t position = row;
    if (positions) memcpy(&position, positions + sequence->positions + row * t->position_stride, sizeof position);
    return position;
}

static void turn_unit(const struct turning *t, int64_t unit, const struct buffers *b) {
    const struct gqa_array *x = &t->problem->x, *out = &t->problem->out;
    const int64_t pairs = t->problem->pairs, length = x->shape[x->ndim - 2];
    const int64_t begin = unit % t->blocks * BLOCK, first_sharer = unit / t->blocks % t->parts * SHARERS;
    const int64_t rows = length - begin < BLOCK ? length - begin : BLOCK;
    const struct place origin = {x->data, out->data, 0};
    const struct place own = step(&t->own, origin, unit / t->blocks / t->parts);
    for (int64_t row = 0; row < rows; row++)
        find_angles(t->problem, position_of(t, &own, begin + row), b->cosines + row * pairs, b->sines + row * pairs);
    for (int64_t i = first_sharer; i < first_sharer + SHARERS && i < t->shared.count; i++) {
        const struct place first = step(&t->shared, own, i);
        for (int64_t row = 0; row < rows; row++) {
            const struct place at = {.x = first.x + (begin + row) * x->strides[x->ndim - 2],
                                     .out = first.out + (begin + row) * out->strides[x->ndim - 2]};
            turn_row(t, &at, b->cosines + row * pairs, b->sines + row * pairs, b);
        }
    }
}

static void turn_task(const void *context, int64_t index, void *scratch, struct gqa_job *job) {
    const struct turning *t = context;
    const struct buffers b = cut_scratch(scratch, t->problem->pairs);
    const int64_t begin = index * t->units_per_task;
    const int64_t end = begin + t->units_per_task < t->units ? begin + t->units_per_task : t->units;
    for (int64_t unit = begin; unit < end && !gqa_job_stopped(job); unit++) turn_unit(t, unit, &b);
}

/* ---- what is asked ---- */

/* The dimension of positions that goes with a leading one of x, or -1: positions have no heads. */
static int position_dim(const struct gqa_rope *problem, int d) {
    const int behind = problem->x.ndim - 3 - d; /* leading dimensions from d to that of heads */
    return behind < 1 ? -1 : problem->positions.ndim - 1 - behind;
}

static bool positions_fit(const struct gqa_rope *problem) {
    const struct gqa_array *x = &problem->x, *positions = &problem->positions;
    if (!positions->data) return true;
    if (positions->dtype != GQA_INT64 || positions->swapped || positions->ndim < 1) return false;
    if (positions->ndim > (x->ndim > 2 ? x->ndim - 2 : 1)) return false;
    if (positions->shape[positions->ndim - 1] != x->shape[x->ndim - 2]) return false;
    for (int d = 0; d < x->ndim - 3; d++) {
        const int place = position_dim(problem, d);
        if (place >= 0 && positions->shape[place] != 1 && positions->shape[place] != x->shape[d]) return false;
    }
    return true;
}

static bool arrays_fit(const struct gqa_rope *problem) {
    const struct gqa_array *x = &problem->x, *out = &problem->out;
    if (x->ndim < 2 || x->dtype > GQA_FLOAT64 || out->ndim != x->ndim || out->dtype != x->dtype) return false;
    for (int d = 0; d < x->ndim; d++)
        if (out->shape[d] != x->shape[d]) return false;
    return problem->pairs >= 1 && problem->pairs <= x->shape[x->ndim - 1] / 2 && positions_fit(problem);
}

static void list_dims(struct turning *t) {
    const struct gqa_array *x = &t->problem->x, *positions = &t->problem->positions;
    t->own.count = t->shared.count = 1;
    for (int d = 0; d < x->ndim - 2; d++) {
        const int place = positions->data ? position_dim(t->problem, d) : -1;
        const int64_t stride = place >= 0 && positions->shape[place] > 1 ? positions->strides[place] : 0;
        struct walk *walk = stride ? &t->own : &t->shared;
        walk->dims[walk->ndim].length = x->shape[d];
        walk->dims[walk->ndim].x = x->strides[d];
        walk->dims[walk->ndim].out = t->problem->out.strides[d];
        walk->dims[walk->ndim].positions = stride;
        walk->ndim++;
        walk->count *= x->shape[d];
    }
    if (positions->data) t->position_stride = positions->strides[positions->ndim - 1];
}

enum gqa_status gqa_rope_run(const struct gqa_rope *problem, struct gqa_poll poll) {
    if (!arrays_fit(problem)) return GQA_BAD_ARGUMENT;
    struct turning t = {.problem = problem, .itemsize = gqa_itemsize(problem->x.dtype)};
    list_dims(&t);
    t.blocks = gqa_ceil_div(problem->x.shape[problem->x.ndim - 2], BLOCK);
    t.parts = gqa_ceil_div(t.shared.count, SHARERS);
    t.units = t.own.count * t.blocks * t.parts;
    if (t.units == 0) return GQA_OK;
    const int64_t unit_elements = BLOCK * 2 * problem->pairs * gqa_min(t.shared.count, SHARERS);
    t.units_per_task = gqa_max(1, TASK_ELEMENTS / unit_elements);
    const int64_t tasks = gqa_ceil_div(t.units, t.units_per_task);
    return gqa_pool_run(turn_task, &t, tasks, scratch_bytes(problem->pairs), gqa_get_num_threads(), poll);
}
