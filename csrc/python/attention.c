/* attention.c: _core.attention; see binding.h.  Called by gqa_ext/attention.py and packed.py. */
#define NO_IMPORT_ARRAY
#include "binding.h"

enum { LEFT, RIGHT, SOFTCAP, SLOPES, SINKS, QUERY_LENGTHS, KV_LENGTHS, QUERY_POSITIONS, KEY_POSITIONS };
enum { CU_SEQLENS_Q = KEY_POSITIONS + 1, CU_SEQLENS_K, DROPOUT_P, SEED, WEIGHTS };
enum { CACHED_KEYS = WEIGHTS + 1, BLOCK_TABLE, KEY_SCALES, VALUE_SCALES, RULES };

static bool to_rule_arrays(const struct state *state, PyObject *const *rules, struct gqa_attention *problem) {
    return to_optional_array(state, rules[SLOPES], &problem->alibi_slopes) &&
           to_optional_array(state, rules[SINKS], &problem->sinks) &&
           to_optional_array(state, rules[QUERY_LENGTHS], &problem->query_lengths) &&
           to_optional_array(state, rules[KV_LENGTHS], &problem->kv_lengths) &&
           to_optional_array(state, rules[QUERY_POSITIONS], &problem->query_positions) &&
           to_optional_array(state, rules[KEY_POSITIONS], &problem->key_positions) &&
           to_optional_array(state, rules[CU_SEQLENS_Q], &problem->cu_seqlens_q) &&
           to_optional_array(state, rules[CU_SEQLENS_K], &problem->cu_seqlens_k) &&
           to_optional_array(state, rules[WEIGHTS], &problem->weights) &&
           to_optional_array(state, rules[BLOCK_TABLE], &problem->block_table) &&
           to_optional_array(state, rules[KEY_SCALES], &problem->key_scales) &&
           to_optional_array(state, rules[VALUE_SCALES], &problem->value_scales);
}

static bool to_rules(const struct state *state, PyObject *object, struct gqa_attention *problem) {
    PyObject *none[RULES];
    PyObject *const *rules = none;
    bool has_softcap, has_dropout;
    for (int i = 0; i < RULES; i++) none[i] = Py_None;
    if (object != Py_None) {
        if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != RULES) return false;
        rules = PySequence_Fast_ITEMS(object);
    }
    problem->seed = PyLong_Check(rules[SEED]) ? PyLong_AsUnsignedLongLongMask(rules[SEED]) : 0;
    if (!to_side(rules[CACHED_KEYS], &problem->cached_keys)) return false;
    problem->cached = problem->cached_keys != GQA_OPEN;
    return to_side(rules[LEFT], &problem->left) && to_side(rules[RIGHT], &problem->right) &&
           to_optional_double(rules[SOFTCAP], &problem->softcap, &has_softcap) &&
           to_optional_double(rules[DROPOUT_P], &problem->dropout_p, &has_dropout) &&
           to_rule_arrays(state, rules, problem);
}

enum { QUERY, KEY, VALUE, MASK, CAUSAL, ALIGNMENT, SCALE, GROUPED, SCORE_RULES, OUT, WANT_LSE, ATTENTION_ARGS };

static bool to_attention(const struct state *state, PyObject *const *args, struct gqa_attention *problem) {
    int alignment;
    if (!to_int(args[ALIGNMENT], &alignment) || (alignment != GQA_UPPER_LEFT && alignment != GQA_LOWER_RIGHT))
        return false;
    problem->alignment = (enum gqa_alignment)alignment;
    return to_array(state, args[QUERY], &problem->query) && to_array(state, args[KEY], &problem->key) &&
           to_array(state, args[VALUE], &problem->value) && to_optional_array(state, args[MASK], &problem->mask) &&
           to_bool(args[CAUSAL], &problem->causal) && to_bool(args[GROUPED], &problem->grouped) &&
           to_optional_double(args[SCALE], &problem->scale, &problem->has_scale) &&
           to_rules(state, args[SCORE_RULES], problem);
}

/* Describes the caller's out or a new one, and a new lse if wanted.  New references in *out, *lse. */
static enum gqa_status attention_outputs(const struct state *state, PyObject *const *args,
                                         struct gqa_attention *problem, PyObject **out, PyObject **lse) {
    int ndim;
    int64_t shape[GQA_MAX_DIMS];
    bool want_lse;
    enum gqa_status status = gqa_attention_shape(problem, &ndim, shape);
    if (status != GQA_OK || !to_bool(args[WANT_LSE], &want_lse)) return GQA_BAD_ARGUMENT;
    int type = PyArray_TYPE((PyArrayObject *)args[QUERY]);
    if (args[OUT] == Py_None)
        *out = new_array(state, ndim, shape, type, &problem->out);
    else if (to_writable_array(state, args[OUT], &problem->out))
        *out = Py_NewRef(args[OUT]);
    else
        return GQA_BAD_ARGUMENT;
    problem->lse.data = NULL;
    if (want_lse) *lse = new_array(state, ndim - 1, shape, type == NPY_DOUBLE ? NPY_DOUBLE : NPY_FLOAT, &problem->lse);
    return *out && (*lse || !want_lse) ? GQA_OK : GQA_NO_MEMORY;
}

PyObject *attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const struct state *state = PyModule_GetState(module);
    struct gqa_attention problem;
    struct released gil;
    PyObject *out = NULL, *lse = NULL, *result = NULL;
    enum gqa_status status = GQA_BAD_ARGUMENT;

    if (nargs != ATTENTION_ARGS || !to_attention(state, args, &problem)) goto done;
    status = attention_outputs(state, args, &problem, &out, &lse);
    if (status != GQA_OK) goto done;
    struct gqa_poll poll = release_gil(&gil);
    status = gqa_attention_run(&problem, poll);
    status = take_gil(&gil, status);
done:
    if (status != GQA_OK)
        refuse(status, "attention", args, nargs);
    else
        result = lse ? PyTuple_Pack(2, out, lse) : Py_NewRef(out);
    Py_XDECREF(out);
    Py_XDECREF(lse);
    return result;
}
