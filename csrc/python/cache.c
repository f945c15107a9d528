/* cache.c: _core.cache_append; see binding.h.  Called by gqa_ext/cache.py and paged.py. */
#define NO_IMPORT_ARRAY
#include "binding.h"

enum { KEYS, VALUES, KEY_SCALES, VALUE_SCALES, BLOCK_TABLE, NEW_KEYS, NEW_VALUES, LENGTHS, COUNTS, APPEND_ARGS };

static bool to_append(const struct state *state, PyObject *const *args, struct gqa_cache_append *problem) {
    return to_writable_array(state, args[KEYS], &problem->keys) &&
           to_writable_array(state, args[VALUES], &problem->values) &&
           to_optional_array(state, args[KEY_SCALES], &problem->key_scales) &&
           to_optional_array(state, args[VALUE_SCALES], &problem->value_scales) &&
           to_optional_array(state, args[BLOCK_TABLE], &problem->block_table) &&
           to_array(state, args[NEW_KEYS], &problem->new_keys) &&
           to_array(state, args[NEW_VALUES], &problem->new_values) &&
           to_array(state, args[LENGTHS], &problem->lengths) && to_array(state, args[COUNTS], &problem->counts);
}

PyObject *cache_append(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    struct gqa_cache_append problem;
    struct released gil;
    enum gqa_status status = GQA_BAD_ARGUMENT;

    if (nargs != APPEND_ARGS || !to_append(PyModule_GetState(module), args, &problem)) goto done;
    struct gqa_poll poll = release_gil(&gil);
    status = gqa_cache_append_run(&problem, poll);
    status = take_gil(&gil, status);
done:
    return status == GQA_OK ? Py_NewRef(Py_None) : refuse(status, "cache_append", args, nargs);
}
