// Functions that do the work of the CPU ops without going through torch's dispatcher, which takes longer than
// the work itself if the tensor is small.
//
// They access the memory of tensors through the DLPack C exchange API of recent torch releases. The caller,
// fastquant/_native/fast_calls.py, first makes sure that nothing (autograd, a dispatch mode, a tracer) has to
// see the op, and allocates the results. If a function does not support its arguments, it changes nothing and
// returns None. The caller then calls the op, which does the work or raises an error about the arguments.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace fastquant {

using FastCall = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);

// Casts a FastCall to the type that PyMethodDef needs. The cast by way of void (*)() avoids a compiler warning.
inline PyCFunction as_method(FastCall f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyObject* set_up_fast_calls(PyObject* self, PyObject* args);
PyObject* is_on_call(PyObject* self, PyObject* flag);
PyObject* prefer_huge_pages_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_minmax_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_histogram_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* histogram_qparams_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fused_observe_fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* add_observe_fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_folded_weight_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fold_weight_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fold_weight_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* batch_norm_observe_fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* batch_norm_fake_quantize_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fake_quantize_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
