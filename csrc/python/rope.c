/* rope.c: _core.rope; see binding.h.  Called by gqa_ext/rope.py. */
#define NO_IMPORT_ARRAY
#include "binding.h"

enum { X, POSITIONS, FREQUENCIES, SCALE, INTERLEAVED, OUT, ROPE_ARGS };

static bool to_rope(const struct state *state, PyObject *const *args, struct gqa_rope *problem) {
    int64_t rows;
    bool has_scale;
    const void *frequencies;
    if (!to_table(args[FREQUENCIES], NPY_DOUBLE, &rows, &problem->pairs, &frequencies) || rows != 1) return false;
    problem->frequencies = frequencies;
    return to_array(state, args[X], &problem->x) && to_optional_array(state, args[POSITIONS], &problem->positions) &&
           to_optional_double(args[SCALE], &problem->scale, &has_scale) && has_scale &&
           to_bool(args[INTERLEAVED], &problem->interleaved);
}

/* Describes the caller's out or a new array.  A new reference in *out. */
static enum gqa_status rope_output(const struct state *state, PyObject *const *args, struct gqa_rope *problem,
                                   PyObject **out) {
    const struct gqa_array *x = &problem->x;
    if (args[OUT] == Py_None)
        *out = new_array(state, x->ndim, x->shape, PyArray_TYPE((PyArrayObject *)args[X]), &problem->out);
    else if (to_writable_array(state, args[OUT], &problem->out))
        *out = Py_NewRef(args[OUT]);
    else
        return GQA_BAD_ARGUMENT;
    return *out ? GQA_OK : GQA_NO_MEMORY;
}

PyObject *rope(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const struct state *state = PyModule_GetState(module);
    struct gqa_rope problem;
    struct released gil;
    PyObject *out = NULL;
    enum gqa_status status = GQA_BAD_ARGUMENT;

    if (nargs != ROPE_ARGS || !to_rope(state, args, &problem)) goto done;
    status = rope_output(state, args, &problem, &out);
    if (status != GQA_OK) goto done;
    struct gqa_poll poll = release_gil(&gil);
    status = gqa_rope_run(&problem, poll);
    status = take_gil(&gil, status);
done:
    if (status == GQA_OK) return out;
    Py_XDECREF(out);
    return refuse(status, "rope", args, nargs);
}
