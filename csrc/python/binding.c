/* binding.c: objects into C, results out, the GIL, and refusals; see binding.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* syscall */
#endif
#define NO_IMPORT_ARRAY
#include "binding.h"

#include <limits.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

/* ---- refusals ---- */

PyObject *explain(const char *call, PyObject *const *args, Py_ssize_t nargs) {
    PyObject *module = PyImport_ImportModule("gqa_ext._explain");
    PyObject *function = module ? PyObject_GetAttrString(module, call) : NULL;
    PyObject *result = function ? PyObject_Vectorcall(function, args, (size_t)nargs, NULL) : NULL;
    if (result) PyErr_Format(PyExc_SystemError, "_core.%s() refused what _explain.%s() accepts", call, call);
    Py_XDECREF(result);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return NULL;
}

/* Whether NumPy refused a size that no address counts, a ValueError that says nothing of the call; forgets it if so. */
static bool overflows(enum gqa_status status) {
    if (status != GQA_NO_MEMORY || !PyErr_Occurred() || !PyErr_ExceptionMatches(PyExc_ValueError)) return false;
    PyErr_Clear();
    return true;
}

PyObject *refuse(enum gqa_status status, const char *call, PyObject *const *args, Py_ssize_t nargs) {
    if (overflows(status)) return explain(call, args, nargs);
    if (PyErr_Occurred()) /* interrupted, or NumPy could not allocate */
        return NULL;
    if (status == GQA_NO_MEMORY) return PyErr_NoMemory();
    if (status == GQA_INTERRUPTED) { /* without an exception: a signal handler forked, and this is the child */
        PyErr_Format(PyExc_RuntimeError, "_core.%s() lost its threads to a fork inside it", call);
        return NULL;
    }
    return explain(call, args, nargs);
}

/* ---- converters: false (and no exception) where the object is not what it must be ---- */

static bool to_dtype(const struct state *state, int number, enum gqa_dtype *dtype) {
    switch (number) {
    case NPY_FLOAT: *dtype = GQA_FLOAT32; return true;
    case NPY_DOUBLE: *dtype = GQA_FLOAT64; return true;
    case NPY_HALF: *dtype = GQA_FLOAT16; return true;
    case NPY_BOOL: *dtype = GQA_BOOL; return true;
    case NPY_INT64: *dtype = GQA_INT64; return true;
    case NPY_BYTE: *dtype = GQA_INT8; return true;
    default: *dtype = GQA_BFLOAT16; return number == state->bfloat16;
    }
}

bool to_array(const struct state *state, PyObject *object, struct gqa_array *array) {
    if (!PyArray_CheckExact(object)) return false;
    PyArrayObject *source = (PyArrayObject *)object;
    array->data = PyArray_BYTES(source);
    array->swapped = !PyArray_ISNOTSWAPPED(source);
    array->ndim = PyArray_NDIM(source);
    for (int i = 0; i < array->ndim; i++) {
        array->shape[i] = PyArray_DIM(source, i);
        array->strides[i] = PyArray_STRIDE(source, i);
    }
    return to_dtype(state, PyArray_TYPE(source), &array->dtype);
}

bool to_optional_array(const struct state *state, PyObject *object, struct gqa_array *array) {
    array->data = NULL;
    array->ndim = 0;
    return object == Py_None || to_array(state, object, array);
}

bool to_writable_array(const struct state *state, PyObject *object, struct gqa_array *array) {
    return to_array(state, object, array) && PyArray_ISWRITEABLE((PyArrayObject *)object);
}

bool to_bool(PyObject *object, bool *flag) {
    *flag = object == Py_True;
    return PyBool_Check(object);
}

bool to_int(PyObject *object, int *number) {
    int overflow = 0;
    long wide = PyLong_Check(object) ? PyLong_AsLongAndOverflow(object, &overflow) : 0;
    *number = (int)wide;
    return PyLong_Check(object) && !overflow && wide >= INT_MIN && wide <= INT_MAX;
}

bool to_optional_double(PyObject *object, double *number, bool *given) {
    *given = object != Py_None;
    *number = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : 0;
    return !*given || PyFloat_Check(object);
}

bool to_side(PyObject *object, int64_t *side) {
    int overflow = 0;
    long long wide = PyLong_Check(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
    *side = object == Py_None ? GQA_OPEN : (int64_t)wide;
    return object == Py_None || (PyLong_Check(object) && !overflow && wide >= 0);
}

bool to_table(PyObject *object, int type, int64_t *rows, int64_t *columns, const void **items) {
    if (!PyArray_CheckExact(object)) return false;
    PyArrayObject *source = (PyArrayObject *)object;
    if (PyArray_NDIM(source) != 2 || PyArray_TYPE(source) != type || !PyArray_ISCARRAY_RO(source)) return false;
    *rows = PyArray_DIM(source, 0);
    *columns = PyArray_DIM(source, 1);
    *items = PyArray_DATA(source);
    return true;
}

/* ---- results ---- */

PyObject *new_array(const struct state *state, int ndim, const int64_t *shape, int type, struct gqa_array *array) {
    npy_intp dims[GQA_MAX_DIMS];
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    PyObject *result = PyArray_EMPTY(ndim, dims, type, 0);
    if (result) to_array(state, result, array);
    return result;
}

/* ---- the GIL, and Ctrl-C while it is released ---- */

/* Only this thread runs signal handlers.  Any other one must not take the GIL in the middle of a job:
 * a daemon thread that asks for it while the interpreter exits never comes back. */
static bool on_main_thread(void) {
#if defined(__linux__)
    return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    return pthread_main_np() != 0;
#else
    return false;
#endif
}

static bool stop_on_signal(void *arg) {
    struct released *gil = arg;
    if (gil->raised || !on_main_thread()) return gil->raised;
    PyEval_RestoreThread(gil->thread);
    gil->raised = PyErr_CheckSignals() < 0;
    gil->thread = PyEval_SaveThread();
    return gil->raised;
}

struct gqa_poll release_gil(struct released *gil) {
    gil->raised = false;
    gil->thread = PyEval_SaveThread();
    return (struct gqa_poll){stop_on_signal, gil};
}

enum gqa_status take_gil(struct released *gil, enum gqa_status status) {
    PyEval_RestoreThread(gil->thread);
    return gil->raised ? GQA_INTERRUPTED : status;
}
