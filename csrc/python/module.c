/* module.c: gqa_ext._core itself: its table of calls, and those that are about the process.
 * Called by gqa_ext/_runtime.py and gqa_ext/testing.py; binding.h says what holds for every call. */
#include "binding.h"

#include <string.h>

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
    {"cache_append", (PyCFunction)(void (*)(void))cache_append, METH_FASTCALL, NULL},
    {"pool_heads", (PyCFunction)(void (*)(void))pool_heads, METH_FASTCALL, NULL},
    {"rope", (PyCFunction)(void (*)(void))rope, METH_FASTCALL, NULL},
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
