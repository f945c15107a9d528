/* module.c: gqa_ext._core, the only file that knows Python and the NumPy C API.
 *
 * A wrapper converts its arguments into the problem struct of gqa.h, releases the
 * GIL, makes one C call and leaves by one label.  It builds no message: when the
 * call or a converter says no, gqa_ext._explain gets the same arguments and raises.
 * Called by gqa_ext/attention.py, gqa_ext/convert and gqa_ext/testing.py, which pass
 * exact ndarrays; anything else is refused, never trusted. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* syscall */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <numpy/arrayobject.h>

#include <limits.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "gqa.h"

struct state {
    int bfloat16; /* the type number that NumPy gave ml_dtypes.bfloat16 in this process */
};

/* ---- refusals ---- */

/* gqa_ext._explain.<call>(*args), which raises.  Always NULL. */
static PyObject *explain(const char *call, PyObject *const *args, Py_ssize_t nargs) {
    PyObject *module = PyImport_ImportModule("gqa_ext._explain");
    PyObject *function = module ? PyObject_GetAttrString(module, call) : NULL;
    PyObject *result = function ? PyObject_Vectorcall(function, args, (size_t)nargs, NULL) : NULL;
    if (result) PyErr_Format(PyExc_SystemError, "_core.%s() refused what _explain.%s() accepts", call, call);
    Py_XDECREF(result);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return NULL;
}

/* The exception for a status other than GQA_OK.  Always NULL. */
static PyObject *refuse(enum gqa_status status, const char *call, PyObject *const *args, Py_ssize_t nargs) {
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
    default: *dtype = GQA_BFLOAT16; return number == state->bfloat16;
    }
}

static bool to_array(const struct state *state, PyObject *object, struct gqa_array *array) {
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

static bool to_optional_array(const struct state *state, PyObject *object, struct gqa_array *array) {
    array->data = NULL;
    array->ndim = 0;
    return object == Py_None || to_array(state, object, array);
}

static bool to_writable_array(const struct state *state, PyObject *object, struct gqa_array *array) {
    return to_array(state, object, array) && PyArray_ISWRITEABLE((PyArrayObject *)object);
}

static bool to_bool(PyObject *object, bool *flag) {
    *flag = object == Py_True;
    return PyBool_Check(object);
}

static bool to_int(PyObject *object, int *number) {
    int overflow = 0;
    long wide = PyLong_Check(object) ? PyLong_AsLongAndOverflow(object, &overflow) : 0;
    *number = (int)wide;
    return PyLong_Check(object) && !overflow && wide >= INT_MIN && wide <= INT_MAX;
}

static bool to_optional_double(PyObject *object, double *number, bool *given) {
    *given = object != Py_None;
    *number = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : 0;
    return !*given || PyFloat_Check(object);
}

/* One side of a window. */
static bool to_side(PyObject *object, int64_t *side) {
    int overflow = 0;
    long long wide = PyLong_Check(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
    *side = object == Py_None ? GQA_OPEN : (int64_t)wide;
    return object == Py_None || (PyLong_Check(object) && !overflow && wide >= 0);
}

/* The items of a C-contiguous (rows, columns) array of one native type. */
static bool to_table(PyObject *object, int type, int64_t *rows, int64_t *columns, const void **items) {
    if (!PyArray_CheckExact(object)) return false;
    PyArrayObject *source = (PyArrayObject *)object;
    if (PyArray_NDIM(source) != 2 || PyArray_TYPE(source) != type || !PyArray_ISCARRAY_RO(source)) return false;
    *rows = PyArray_DIM(source, 0);
    *columns = PyArray_DIM(source, 1);
    *items = PyArray_DATA(source);
    return true;
}

/* ---- results ---- */

/* A new C-contiguous array of native byte order, also described in *array. */
static PyObject *new_array(const struct state *state, int ndim, const int64_t *shape, int type,
                           struct gqa_array *array) {
    npy_intp dims[GQA_MAX_DIMS];
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    PyObject *result = PyArray_EMPTY(ndim, dims, type, 0);
    if (result) to_array(state, result, array);
    return result;
}

/* ---- the GIL, and Ctrl-C while it is released ---- */

struct released {
    PyThreadState *thread;
    bool raised; /* a signal handler did: stop */
};

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

static struct gqa_poll release_gil(struct released *gil) {
    gil->raised = false;
    gil->thread = PyEval_SaveThread();
    return (struct gqa_poll){stop_on_signal, gil};
}

static enum gqa_status take_gil(struct released *gil, enum gqa_status status) {
    PyEval_RestoreThread(gil->thread);
    return gil->raised ? GQA_INTERRUPTED : status;
}

/* ---- attention ---- */

enum { LEFT, RIGHT, SOFTCAP, SLOPES, SINKS, QUERY_LENGTHS, KV_LENGTHS, QUERY_POSITIONS, KEY_POSITIONS };
enum { CU_SEQLENS_Q = KEY_POSITIONS + 1, CU_SEQLENS_K, DROPOUT_P, SEED, WEIGHTS, RULES };

static bool to_rule_arrays(const struct state *state, PyObject *const *rules, struct gqa_attention *problem) {
    return to_optional_array(state, rules[SLOPES], &problem->alibi_slopes) &&
           to_optional_array(state, rules[SINKS], &problem->sinks) &&
           to_optional_array(state, rules[QUERY_LENGTHS], &problem->query_lengths) &&
           to_optional_array(state, rules[KV_LENGTHS], &problem->kv_lengths) &&
           to_optional_array(state, rules[QUERY_POSITIONS], &problem->query_positions) &&
           to_optional_array(state, rules[KEY_POSITIONS], &problem->key_positions) &&
           to_optional_array(state, rules[CU_SEQLENS_Q], &problem->cu_seqlens_q) &&
           to_optional_array(state, rules[CU_SEQLENS_K], &problem->cu_seqlens_k) &&
           to_optional_array(state, rules[WEIGHTS], &problem->weights);
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

static PyObject *attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
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

/* ---- pooling of heads ---- */

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

static PyObject *pool_heads(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
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

/* ---- which kernels, how many threads ---- */

static PyObject *isa_available(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    PyObject *names = PyList_New(0);
    const char *text;
    for (int i = 0; names && (text = gqa_isa_available(i)); i++) {
        PyObject *name = PyUnicode_FromString(text);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    PyObject *result = names ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return result;
}

static PyObject *isa_current(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    return PyUnicode_FromString(gqa_isa_current());
}

static PyObject *isa_use(PyObject *Py_UNUSED(module), PyObject *name) {
    Py_ssize_t length;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &length) : NULL;
    if (!text || strlen(text) != (size_t)length || gqa_isa_use(text) != GQA_OK) {
        PyErr_Clear(); /* a lone surrogate has no UTF-8 */
        return explain("isa_use", &name, 1);
    }
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused)) {
    return PyLong_FromLong(gqa_get_num_threads());
}

static PyObject *set_num_threads(PyObject *Py_UNUSED(module), PyObject *number) {
    int count;
    if (!to_int(number, &count) || count < 1) return explain("set_num_threads", &number, 1);
    gqa_set_num_threads(count);
    Py_RETURN_NONE;
}

/* ---- the module ---- */

/* NumPy numbers the types of other packages as they are registered, so the number is asked for. */
static int find_bfloat16(struct state *state) {
    PyObject *ml_dtypes = PyImport_ImportModule("ml_dtypes");
    PyObject *type = ml_dtypes ? PyObject_GetAttrString(ml_dtypes, "bfloat16") : NULL;
    PyArray_Descr *descr = type ? PyArray_DescrFromTypeObject(type) : NULL;
    if (descr) state->bfloat16 = descr->type_num;
    Py_XDECREF(descr);
    Py_XDECREF(type);
    Py_XDECREF(ml_dtypes);
    return descr ? 0 : -1;
}

static int module_exec(PyObject *module) {
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    return find_bfloat16(PyModule_GetState(module));
}

static PyMethodDef methods[] = {
    {"attention", (PyCFunction)(void (*)(void))attention, METH_FASTCALL, NULL},
    {"pool_heads", (PyCFunction)(void (*)(void))pool_heads, METH_FASTCALL, NULL},
    {"isa_available", isa_available, METH_NOARGS, NULL},
    {"isa_current", isa_current, METH_NOARGS, NULL},
    {"isa_use", isa_use, METH_O, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,          .m_name = "gqa_ext._core", .m_doc = "The C core of gqa_ext; private.",
    .m_size = sizeof(struct state), .m_methods = methods,      .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
