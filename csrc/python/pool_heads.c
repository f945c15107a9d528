/* pool_heads.c: _core.pool_heads; see binding.h.  Called by gqa_ext/convert. */
#define NO_IMPORT_ARRAY
#include "binding.h"

enum { WEIGHT, POOLED, AXIS, NUM_HEADS, MEMBERS, SHARES, POOL_ARGS };

static bool to_pool_heads(const struct state *state, PyObject *const *args, struct gqa_pool_heads *problem) {
    int num_heads;
    int64_t rows, columns;
    const void *members, *shares = NULL;
    if (!to_int(args[AXIS], &problem->axis) || !to_int(args[NUM_HEADS], &num_heads) ||
        !to_table(args[MEMBERS], NPY_INT64, &problem->num_kv_heads, &problem->members_per_head, &members))
        return false;
    if (args[SHARES] != Py_None && (!to_table(args[SHARES], NPY_DOUBLE, &rows, &columns, &shares) ||
                                    rows != problem->num_kv_heads || columns != problem->members_per_head))
        return false;
    problem->members = members;
    problem->weights = shares;
    problem->num_heads = num_heads;
    return to_array(state, args[WEIGHT], &problem->weight) && to_writable_array(state, args[POOLED], &problem->out);
}

PyObject *pool_heads(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    struct gqa_pool_heads problem;
    struct released gil;
    enum gqa_status status = GQA_BAD_ARGUMENT;

    if (nargs != POOL_ARGS || !to_pool_heads(PyModule_GetState(module), args, &problem)) goto done;
    struct gqa_poll poll = release_gil(&gil);
    status = gqa_pool_heads_run(&problem, poll);
    status = take_gil(&gil, status);
done:
    return status == GQA_OK ? Py_NewRef(args[POOLED]) : refuse(status, "pool_heads", args, nargs);
}
