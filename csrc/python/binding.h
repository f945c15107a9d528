/* binding.h: what every call of gqa_ext._core is made of.  The files of this folder are the only ones
 * that know Python and the NumPy C API.
 *
 * A wrapper converts its arguments into the problem struct of gqa.h, releases the
 * GIL, makes one C call and leaves by one label.  It builds no message: when the
 * call or a converter says no, gqa_ext._explain gets the same arguments and raises.
 * Callers pass exact ndarrays; anything else is refused, never trusted. */
#ifndef GQA_BINDING_H
#define GQA_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL gqa_numpy /* one table of NumPy's functions, which module.c fills */
#include <numpy/arrayobject.h>

#include <stdbool.h>

#include "gqa.h"

struct state {
    int bfloat16; /* the type number that NumPy gave ml_dtypes.bfloat16 in this process */
};

/* ---- refusals; always NULL ---- */

/* gqa_ext._explain.<call>(*args), which raises. */
PyObject *explain(const char *call, PyObject *const *args, Py_ssize_t nargs);

/* The exception for a status other than GQA_OK. */
PyObject *refuse(enum gqa_status status, const char *call, PyObject *const *args, Py_ssize_t nargs);

/* ---- converters: false (and no exception) where the object is not what it must be ---- */

bool to_array(const struct state *state, PyObject *object, struct gqa_array *array);
bool to_optional_array(const struct state *state, PyObject *object, struct gqa_array *array); /* None is absent */
bool to_writable_array(const struct state *state, PyObject *object, struct gqa_array *array);
bool to_bool(PyObject *object, bool *flag);
bool to_int(PyObject *object, int *number);
bool to_optional_double(PyObject *object, double *number, bool *given);
bool to_side(PyObject *object, int64_t *side); /* of a window */

/* The items of a C-contiguous (rows, columns) array of one native type. */
bool to_table(PyObject *object, int type, int64_t *rows, int64_t *columns, const void **items);

/* ---- results ---- */

/* A new C-contiguous array of native byte order, also described in *array. */
PyObject *new_array(const struct state *state, int ndim, const int64_t *shape, int type, struct gqa_array *array);

/* ---- the GIL, and Ctrl-C while it is released ---- */

struct released {
    PyThreadState *thread;
    bool raised; /* a signal handler did: stop */
};

struct gqa_poll release_gil(struct released *gil);
enum gqa_status take_gil(struct released *gil, enum gqa_status status);

/* ---- calls, in the table of module.c ---- */

PyObject *attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *cache_append(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *pool_heads(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *rope(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

#endif
