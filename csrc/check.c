/* check.c: says yes or no to an attention problem; who wants to know why asks Python.
 * gqa_attention_shape is called by python/attention.c and plan.c. */
#include "check.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "elements.h"

static bool is_half_or_float(enum gqa_dtype dtype) {
    return gqa_is_float(dtype) && dtype != GQA_FLOAT64;
}

/* float64 goes only with float64; the others in any mix, and int8 where scales say what it means. */
static bool types_fit(const struct gqa_attention *problem) {
    const enum gqa_dtype query = problem->query.dtype, key = problem->key.dtype, value = problem->value.dtype;
    if (query == GQA_FLOAT64) return key == GQA_FLOAT64 && value == GQA_FLOAT64;
    return is_half_or_float(query) && (problem->key_scales.data ? key == GQA_INT8 : is_half_or_float(key)) &&
           (problem->value_scales.data ? value == GQA_INT8 : is_half_or_float(value));
}

static bool heads_fit(const struct gqa_attention *problem) {
    const int64_t q_heads = gqa_dim(&problem->query, 3), kv_heads = gqa_dim(&problem->key, 3);
    if (kv_heads != gqa_dim(&problem->value, 3)) return false;
    if (kv_heads == 0 || !problem->grouped) return q_heads == kv_heads;
    return q_heads % kv_heads == 0;
}

static bool matrices_fit(const struct gqa_attention *problem) {
    const struct gqa_array *query = &problem->query, *key = &problem->key, *value = &problem->value;
    if (query->ndim < 2 || key->ndim < 2 || value->ndim < 2) return false;
    return gqa_dim(query, 1) == gqa_dim(key, 1) && gqa_dim(query, 1) > 0 && gqa_dim(key, 2) == gqa_dim(value, 2);
}

/* Widens *size to take in one more operand's size, as NumPy broadcasts. */
static bool broadcast(int64_t *size, int64_t other) {
    if (*size == 1) *size = other;
    return other == 1 || other == *size;
}

/* Whether array broadcasts to shape without widening it. */
static bool spreads_to(const struct gqa_array *array, int ndim, const int64_t *shape) {
    if (!array->data) return true;
    if (array->ndim > ndim) return false;
    for (int back = 1; back <= array->ndim; back++) {
        const int64_t size = gqa_dim(array, back);
        if (size != 1 && size != shape[ndim - back]) return false;
    }
    return true;
}

/* The same, to the leading dimensions of shape and then the given ones. */
static bool spreads_over(const struct gqa_array *array, int ndim, const int64_t *shape, int trailing,
                         const int64_t *sizes) {
    int64_t wanted[GQA_MAX_DIMS];
    const int leading = ndim > 3 ? ndim - 3 : 0;
    if (leading + trailing > GQA_MAX_DIMS) return !array->data;
    memcpy(wanted, shape, (size_t)leading * sizeof *wanted);
    if (trailing) memcpy(wanted + leading, sizes, (size_t)trailing * sizeof *wanted);
    return spreads_to(array, leading + trailing, wanted);
}

/* Every element of an int64 array of any strides is in 0..most. */
static bool all_within(const struct gqa_array *array, int64_t most) {
    int64_t count = array->data ? 1 : 0;
    for (int d = 0; d < array->ndim && count; d++) count *= array->shape[d];
    for (int64_t i = 0; i < count; i++) {
        const char *at = array->data;
        int64_t rest = i, x;
        for (int d = array->ndim - 1; d >= 0; d--) {
            at += rest % array->shape[d] * array->strides[d];
            rest /= array->shape[d];
        }
        memcpy(&x, at, sizeof x);
        if (x < 0 || x > most) return false;
    }
    return true;
}

static bool is_integer(const struct gqa_array *array) {
    return !array->data || (array->dtype == GQA_INT64 && !array->swapped);
}

int64_t gqa_seq_k(const struct gqa_attention *problem) {
    return problem->cached ? problem->cached_keys : gqa_dim(&problem->key, 2);
}

int64_t gqa_integer(const struct gqa_array *array, int64_t i, int64_t j) {
    int64_t x;
    memcpy(&x, array->data + i * array->strides[0] + (array->ndim > 1 ? j * array->strides[1] : 0), sizeof x);
    return x;
}

bool gqa_blocks_fit(const struct gqa_array *table, int64_t b, int64_t first, int64_t end, int64_t rows,
                    int64_t blocks) {
    if (first >= end) return true;
    if ((end - 1) / rows >= table->shape[1]) return false;
    for (int64_t j = first / rows; j <= (end - 1) / rows; j++)
        if (gqa_integer(table, b, j) < 0 || gqa_integer(table, b, j) >= blocks) return false;
    return true;
}

/* Whether array is one of scales for rows. */
static bool scales_fit(const struct gqa_array *scales, const struct gqa_array *rows) {
    if (!scales->data) return true;
    if (scales->dtype != GQA_FLOAT32 || scales->swapped || scales->ndim != rows->ndim - 1) return false;
    return !memcmp(scales->shape, rows->shape, (size_t)scales->ndim * sizeof *scales->shape);
}

/* What a cache adds to the shapes of key and value; called when the lengths are known to fit. */
static bool cache_fits(const struct gqa_attention *problem) {
    const struct gqa_array *key = &problem->key, *value = &problem->value, *table = &problem->block_table;
    const struct gqa_array *lengths = &problem->kv_lengths;
    if (!scales_fit(&problem->key_scales, key) || !scales_fit(&problem->value_scales, value)) return false;
    if (!problem->cached) return !table->data && !problem->key_scales.data && !problem->value_scales.data;
    if (problem->cu_seqlens_q.data || key->ndim != 4 || value->ndim != 4 || lengths->ndim != 1) return false;
    if (!table->data) return gqa_dim(key, 2) > 0 || problem->cached_keys == 0;
    if (table->ndim != 2 || !is_integer(table) || lengths->shape[0] != table->shape[0] ||
        key->shape[0] != value->shape[0] || gqa_dim(key, 2) < 1)
        return false;
    for (int64_t b = 0; b < table->shape[0]; b++)
        if (!gqa_blocks_fit(table, b, 0, gqa_integer(lengths, b, 0), gqa_dim(key, 2), key->shape[0])) return false;
    return true;
}

static bool lengths_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    const struct gqa_array *query = &problem->query_lengths, *kv = &problem->kv_lengths;
    return is_integer(query) && is_integer(kv) && spreads_over(query, ndim, shape, 0, NULL) &&
           spreads_over(kv, ndim, shape, 0, NULL) && all_within(query, gqa_dim(&problem->query, 2)) &&
           all_within(kv, gqa_seq_k(problem));
}

static bool positions_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    const struct gqa_array *query = &problem->query_positions, *key = &problem->key_positions;
    const int64_t seq_q = gqa_dim(&problem->query, 2), seq_k = gqa_seq_k(problem);
    return is_integer(query) && is_integer(key) && spreads_over(query, ndim, shape, 1, &seq_q) &&
           spreads_over(key, ndim, shape, 1, &seq_k);
}

/* A finite number, in float32 one that is neither clamped nor of fewer digits than a normal number. */
static bool is_held(const struct gqa_attention *problem, double x) {
    if (problem->query.dtype == GQA_FLOAT64 || x == 0) return isfinite(x);
    return fabs(x) >= (double)FLT_MIN && fabs(x) <= (double)FLT_MAX;
}

static bool numbers_fit(const struct gqa_attention *problem) {
    if (problem->has_scale && !is_held(problem, problem->scale)) return false;
    if (!(problem->softcap >= 0) || !is_held(problem, problem->softcap)) return false;
    if (!(problem->dropout_p >= 0 && problem->dropout_p <= 1)) return false;
    return problem->left >= GQA_OPEN && problem->right >= GQA_OPEN;
}

static bool is_float(const struct gqa_array *array) {
    return !array->data || gqa_is_float(array->dtype);
}

/* Rising from 0 to at most the number of packed rows. */
static bool rises(const struct gqa_array *cu, int64_t count, int64_t rows) {
    const int64_t *starts = (const int64_t *)(const void *)cu->data;
    if (!starts || cu->ndim != 1 || cu->shape[0] != count || count < 1 || !is_integer(cu) || starts[0] != 0)
        return false;
    for (int64_t b = 1; b < count; b++)
        if (starts[b] < starts[b - 1] || starts[b] > rows) return false;
    return true;
}

/* Packed arrays are (heads, T, D), and take none of the rules that name a slot by its place in a batch. */
static bool packing_fits(const struct gqa_attention *problem) {
    const struct gqa_array *query = &problem->query, *key = &problem->key, *cu = &problem->cu_seqlens_q;
    if (!cu->data) return !problem->cu_seqlens_k.data;
    if (problem->mask.data || problem->weights.data || problem->query_lengths.data || problem->kv_lengths.data ||
        problem->query_positions.data || problem->key_positions.data)
        return false;
    return query->ndim == 3 && key->ndim == 3 && problem->value.ndim == 3 && cu->ndim == 1 &&
           rises(cu, cu->shape[0], gqa_dim(query, 2)) && rises(&problem->cu_seqlens_k, cu->shape[0], gqa_dim(key, 2));
}

/* Slopes of packed sequences: (Hq,) or (B, Hq). */
static bool packed_slopes_fit(const struct gqa_attention *problem) {
    const int64_t wanted[2] = {problem->cu_seqlens_q.shape[0] - 1, gqa_dim(&problem->query, 3)};
    return spreads_to(&problem->alibi_slopes, 2, wanted);
}

static bool rules_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    const struct gqa_array *mask = &problem->mask;
    const int64_t heads = gqa_dim(&problem->query, 3), seq_k = gqa_seq_k(problem);
    int64_t scores[GQA_MAX_DIMS];
    memcpy(scores, shape, (size_t)ndim * sizeof *scores);
    scores[ndim - 1] = seq_k;
    return numbers_fit(problem) && (mask->dtype == GQA_BOOL || is_float(mask)) && spreads_to(mask, ndim, scores) &&
           is_float(&problem->alibi_slopes) && packing_fits(problem) &&
           (problem->cu_seqlens_q.data ? packed_slopes_fit(problem)
                                       : spreads_over(&problem->alibi_slopes, ndim, shape, 1, &heads)) &&
           is_float(&problem->sinks) && spreads_to(&problem->sinks, 1, &heads) && lengths_fit(problem, ndim, shape) &&
           positions_fit(problem, ndim, shape) && cache_fits(problem);
}

/* A leading dimension of blocks as attention sees them: the table's sequences. */
static int64_t sequences(const struct gqa_attention *problem, int back) {
    return back == 4 && problem->block_table.ndim ? problem->block_table.shape[0] : 1;
}

static int larger(int a, int b) { return a > b ? a : b; }

enum gqa_status gqa_attention_shape(const struct gqa_attention *problem, int *ndim, int64_t shape[GQA_MAX_DIMS]) {
    const struct gqa_array *query = &problem->query, *key = &problem->key, *value = &problem->value;
    if (!types_fit(problem) || !matrices_fit(problem) || !heads_fit(problem)) return GQA_BAD_ARGUMENT;
    const bool paged = problem->block_table.data;
    *ndim = larger(query->ndim, larger(key->ndim, value->ndim));
    for (int back = *ndim; back > 3; back--) {
        int64_t *size = &shape[*ndim - back];
        *size = gqa_dim(query, back);
        if (paged ? !broadcast(size, sequences(problem, back))
                  : !broadcast(size, gqa_dim(key, back)) || !broadcast(size, gqa_dim(value, back)))
            return GQA_BAD_ARGUMENT;
    }
    if (*ndim >= 3) shape[*ndim - 3] = gqa_dim(query, 3);
    shape[*ndim - 2] = gqa_dim(query, 2);
    shape[*ndim - 1] = gqa_dim(value, 1);
    return rules_fit(problem, *ndim, shape) ? GQA_OK : GQA_BAD_ARGUMENT;
}

static bool same_shape(const struct gqa_array *array, int ndim, const int64_t *shape) {
    if (array->ndim != ndim) return false;
    for (int i = 0; i < ndim; i++)
        if (array->shape[i] != shape[i]) return false;
    return true;
}

bool gqa_outputs_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    const enum gqa_dtype dtype = problem->query.dtype, exact = dtype == GQA_FLOAT64 ? GQA_FLOAT64 : GQA_FLOAT32;
    const struct gqa_array *lse = &problem->lse, *weights = &problem->weights;
    int64_t scores[GQA_MAX_DIMS];
    memcpy(scores, shape, (size_t)ndim * sizeof *scores);
    scores[ndim - 1] = gqa_seq_k(problem);
    if (problem->out.dtype != dtype || !same_shape(&problem->out, ndim, shape)) return false;
    if (lse->data && (lse->dtype != exact || !same_shape(lse, ndim - 1, shape))) return false;
    return !weights->data || (weights->dtype == exact && same_shape(weights, ndim, scores));
}
