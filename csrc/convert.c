/* convert.c: pools the heads of one K or V projection, in place on the caller's arrays.
 *
 * Seen along problem->axis the weight is (num_heads, head_dim), so the array has one
 * dimension more than NumPy says.  The walk goes over out in rows of up to CHUNK
 * elements along the dimension in which the weight lies closest; a task is some rows.
 * A row whose group has one head left is copied bit for bit.  Else the mean is summed
 * in double with the rounding error beside it, divided, and rounded once.
 * Assumes no contraction to fma (-ffp-contract=off) and FLT_EVAL_METHOD 0.
 * Called by python/pool_heads.c (gqa_ext.convert.pool_heads). */
#include "elements.h"
#include "gqa.h"
#include "half.h"
#include "pool.h"

#include <math.h>

enum {
    CHUNK = 1024,            /* elements of a row: a few rows of doubles stay in L1 */
    TASK_ELEMENTS = 1 << 17, /* read by one task: long beside a dispatch, short beside 0.2 s */
};

struct span {
    int64_t length;
    int64_t weight_stride, out_stride; /* bytes */
};

struct pooling {
    const struct gqa_pool_heads *problem;
    size_t itemsize;
    int ndim;                           /* problem's + 1 */
    struct span dims[GQA_MAX_DIMS + 1]; /* of out in C order; dims[inner] counts chunks */
    int group_dim;                      /* its weight_stride is 0: members say where to read */
    int inner;
    struct span element; /* along the inner dimension */
    int64_t head_stride; /* bytes from one head of weight to the next */
    int64_t rows, rows_per_task;
};

struct row {
    const char *weight; /* head 0 of the row */
    char *out;
    int64_t group, length;
};

struct buffers {
    double x[CHUNK], sum[CHUNK], error[CHUNK], mean[CHUNK];
    char plain[CHUNK * sizeof(double)]; /* elements packed, native byte order */
};

/* ---- one row ---- */

static double member_weight(const struct gqa_pool_heads *problem, int64_t group, int64_t member) {
    return problem->weights ? problem->weights[group * problem->members_per_head + member] : 1.0;
}

static const char *member_row(const struct pooling *p, const struct row *row, int64_t member) {
    const int64_t *members = p->problem->members + row->group * p->problem->members_per_head;
    return row->weight + members[member] * p->head_stride;
}

static void start(double *restrict sum, double *restrict error, const double *restrict x, double weight,
                  int64_t length) {
    for (int64_t i = 0; i < length; i++) {
        sum[i] = weight * x[i];
        error[i] = 0;
    }
}

/* sum + error is the running sum, exact but for what error itself rounds away: 2^-105 of the largest part. */
static void add(double *restrict sum, double *restrict error, const double *restrict x, double weight, int64_t length) {
    for (int64_t i = 0; i < length; i++) {
        const double part = weight * x[i];
        const double total = sum[i] + part;
        const double seen = total - sum[i];
        error[i] += (sum[i] - (total - seen)) + (part - seen);
        sum[i] = total;
    }
}

/* The sum of a group's live members, each weight times scale; returns the sum of these weights. */
static double sum_members(const struct pooling *p, const struct row *row, double scale, struct buffers *b) {
    const struct gqa_array *weight = &p->problem->weight;
    double total = 0;
    bool first = true;
    for (int64_t member = 0; member < p->problem->members_per_head; member++) {
        const double share = scale * member_weight(p->problem, row->group, member);
        if (share == 0) /* dropped by selection: its NaN does not count either */
            continue;
        const char *source = member_row(p, row, member);
        if (weight->swapped || p->element.weight_stride != (int64_t)p->itemsize) {
            gqa_copy_elements(b->plain, (int64_t)p->itemsize, source, p->element.weight_stride, row->length,
                              p->itemsize, weight->swapped);
            source = b->plain;
        }
        gqa_widen(b->x, source, row->length, weight->dtype);
        if (first)
            start(b->sum, b->error, b->x, share, row->length);
        else
            add(b->sum, b->error, b->x, share, row->length);
        first = false;
        total += share;
    }
    return total;
}

/* The head of a double: x - head(x) has 26 bits, so products of heads and tails are exact. */
static inline double head(double x) {
    const double scaled = x * 0x1.0000002p27;
    return scaled - (scaled - x);
}

/* (sum + error) / total rounded to odd: the last bit stands for all that follow, so
 * that rounding once more, to 24 bits or fewer, gives what rounding once would. */
static double divide_to_odd(double sum, double error, double total) {
    const bool has_error = sum - sum == 0 && error != 0;   /* beside inf or NaN error is NaN and says nothing */
    const double dividend = has_error ? sum + error : sum; /* -0 stays -0 */
    const double seen = dividend - sum;
    const double rest = (sum - (dividend - seen)) + (error - seen);

    const double first = dividend / total;
    const double f = head(first), g = first - f, t = head(total), u = total - t;
    const double correction = ((((dividend - f * t) - f * u) - g * t) - g * u + rest) / total;
    const double quotient = correction > 0 || correction < 0 ? first + correction : first;
    const double left = (first - quotient) + correction;

    const uint64_t bits = gqa_double_bits(quotient);
    const bool inexact = (left > 0 || left < 0) && quotient != 0;
    const bool outwards = (left > 0) == (quotient > 0);
    return gqa_double_from_bits(!inexact || bits & 1 ? bits : outwards ? bits + 1 : bits - 1);
}

/* Within 4 units in the last place of a tie between two numbers of 24 bits or fewer. */
static inline bool near_tie(double x) { return ((gqa_double_bits(x) + 4) & 0xfffff) < 8; }

/* In float64 the sums are plain double ones; a sum that overflowed is taken again 2^-64 times as large. */
static void mean_double(const struct pooling *p, const struct row *row, struct buffers *b) {
    double total = sum_members(p, row, 1.0, b);
    int64_t overflowed = 0;
    for (int64_t i = 0; i < row->length; i++) {
        b->mean[i] = b->sum[i] / total;
        overflowed |= b->mean[i] - b->mean[i] != 0;
    }
    if (!overflowed) return;
    total = sum_members(p, row, 0x1p-64, b);
    for (int64_t i = 0; i < row->length; i++) b->mean[i] = isfinite(b->mean[i]) ? b->mean[i] : b->sum[i] / total;
}

/* For the narrower types.  A quotient that is exact, or rounded but not beside a tie,
 * gives in one more rounding what a single one would; the others are rounded to odd. */
static void mean_narrow(const struct pooling *p, const struct row *row, struct buffers *b) {
    const double total = sum_members(p, row, 1.0, b);
    int exponent;
    int64_t rounded = frexp(total, &exponent) != 0.5; /* as wide as a double: the loop vectorises */
    for (int64_t i = 0; i < row->length; i++) rounded |= b->error[i] != 0;
    for (int64_t i = 0; i < row->length; i++) b->mean[i] = (rounded ? b->sum[i] + b->error[i] : b->sum[i]) / total;
    if (!rounded) return;
    for (int64_t i = 0; i < row->length; i++)
        if (near_tie(b->mean[i])) /* so are inf, NaN and 0 */
            b->mean[i] = divide_to_odd(b->sum[i], b->error[i], total);
}

/* The one live member of a group, or -1. */
static int64_t only_member(const struct gqa_pool_heads *problem, int64_t group) {
    int64_t only = -1;
    for (int64_t member = 0; member < problem->members_per_head; member++) {
        if (member_weight(problem, group, member) == 0) continue;
        if (only >= 0) return -1;
        only = member;
    }
    return only;
}

static void pool_row(const struct pooling *p, const struct row *row, struct buffers *b) {
    const struct gqa_array *weight = &p->problem->weight, *out = &p->problem->out;
    const int64_t only = only_member(p->problem, row->group);
    const char *source = b->plain;
    int64_t stride = (int64_t)p->itemsize;
    bool swap = out->swapped;
    if (only >= 0) {
        source = member_row(p, row, only);
        stride = p->element.weight_stride;
        swap = weight->swapped != out->swapped;
    } else {
        if (weight->dtype == GQA_FLOAT64)
            mean_double(p, row, b);
        else
            mean_narrow(p, row, b);
        gqa_narrow(b->plain, b->mean, row->length, out->dtype);
    }
    gqa_copy_elements(row->out, p->element.out_stride, source, stride, row->length, p->itemsize, swap);
}

/* ---- all rows ---- */

static struct row locate(const struct pooling *p, int64_t index) {
    struct row row = {p->problem->weight.data, p->problem->out.data, 0, 0};
    for (int d = p->ndim - 1; d >= 0; d--) {
        const struct span *dim = &p->dims[d];
        const int64_t i = index % dim->length;
        index /= dim->length;
        row.weight += i * dim->weight_stride;
        row.out += i * dim->out_stride;
        if (d == p->group_dim) row.group = i;
        if (d == p->inner) row.length = i + 1 < dim->length ? CHUNK : p->element.length - i * CHUNK;
    }
    return row;
}

static void pool_task(const void *context, int64_t index, void *scratch, struct gqa_job *job) {
    const struct pooling *p = context;
    const int64_t begin = index * p->rows_per_task;
    const int64_t end = begin + p->rows_per_task < p->rows ? begin + p->rows_per_task : p->rows;
    for (int64_t i = begin; i < end && !gqa_job_stopped(job); i++) {
        const struct row row = locate(p, i);
        pool_row(p, &row, scratch);
    }
}

/* The dimension whose neighbours lie closest in weight; that of heads is no candidate. */
static int closest_dim(const struct pooling *p) {
    int best = p->ndim - 1;
    int64_t best_step = INT64_MAX;
    for (int d = p->ndim - 1; d >= 0; d--) {
        const int64_t stride = p->dims[d].weight_stride;
        const int64_t step = stride < 0 ? -stride : stride;
        if (d != p->group_dim && p->dims[d].length > 1 && step > 0 && step < best_step) {
            best = d;
            best_step = step;
        }
    }
    return best;
}

static void list_dims(struct pooling *p) {
    const struct gqa_array *weight = &p->problem->weight, *out = &p->problem->out;
    for (int d = 0; d < weight->ndim; d++) {
        const struct span dim = {out->shape[d], weight->strides[d], out->strides[d]};
        if (d != p->problem->axis) {
            p->dims[p->ndim++] = dim;
            continue;
        }
        const int64_t head_dim = weight->shape[d] / p->problem->num_heads;
        p->head_stride = head_dim * dim.weight_stride;
        p->group_dim = p->ndim;
        p->dims[p->ndim++] = (struct span){p->problem->num_kv_heads, 0, head_dim * dim.out_stride};
        p->dims[p->ndim++] = (struct span){head_dim, dim.weight_stride, dim.out_stride};
    }
}

static void cut_rows(struct pooling *p) {
    p->inner = closest_dim(p);
    p->element = p->dims[p->inner];
    p->dims[p->inner] = (struct span){(p->element.length + CHUNK - 1) / CHUNK, CHUNK * p->element.weight_stride,
                                      CHUNK * p->element.out_stride};
    p->rows = 1;
    for (int d = 0; d < p->ndim; d++) p->rows *= p->dims[d].length;
    const int64_t length = p->element.length < CHUNK ? p->element.length : CHUNK;
    const int64_t reads = (length > 0 ? length : 1) * p->problem->members_per_head;
    p->rows_per_task = reads < TASK_ELEMENTS ? TASK_ELEMENTS / reads : 1;
}

/* ---- what is asked ---- */

static bool members_fit(const struct gqa_pool_heads *problem) {
    if (problem->members == NULL || problem->members_per_head < 1) return false;
    for (int64_t group = 0; group < problem->num_kv_heads; group++) {
        double total = 0;
        for (int64_t member = 0; member < problem->members_per_head; member++) {
            const int64_t from = problem->members[group * problem->members_per_head + member];
            if (from < 0 || from >= problem->num_heads) return false;
            total += member_weight(problem, group, member);
        }
        if (!(total > 0) || !isfinite(total)) return false;
    }
    return true;
}

static bool arrays_fit(const struct gqa_pool_heads *problem) {
    const struct gqa_array *weight = &problem->weight, *out = &problem->out;
    if (weight->ndim < 1 || weight->ndim > GQA_MAX_DIMS || out->ndim != weight->ndim) return false;
    if (problem->axis < 0 || problem->axis >= weight->ndim) return false;
    if (problem->num_heads < 1 || problem->num_kv_heads < 1 || out->dtype != weight->dtype) return false;
    if (weight->dtype > GQA_FLOAT64 || weight->shape[problem->axis] % problem->num_heads != 0) return false;
    const int64_t head_dim = weight->shape[problem->axis] / problem->num_heads;
    for (int d = 0; d < weight->ndim; d++) {
        const int64_t wanted = d == problem->axis ? problem->num_kv_heads * head_dim : weight->shape[d];
        if (out->shape[d] != wanted) return false;
    }
    return true;
}

enum gqa_status gqa_pool_heads_run(const struct gqa_pool_heads *problem, struct gqa_poll poll) {
    if (!arrays_fit(problem) || !members_fit(problem)) return GQA_BAD_ARGUMENT;
    struct pooling p = {.problem = problem, .itemsize = gqa_itemsize(problem->weight.dtype)};
    list_dims(&p);
    cut_rows(&p);
    if (p.rows == 0) return GQA_OK;
    const int64_t tasks = (p.rows + p.rows_per_task - 1) / p.rows_per_task;
    return gqa_pool_run(pool_task, &p, tasks, sizeof(struct buffers), gqa_get_num_threads(), poll);
}
