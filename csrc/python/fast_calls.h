// The ops without torch's dispatcher, which takes longer than the work on a small tensor.
//
// Memory is reached through the DLPack C exchange API that torch.Tensor has in newer releases.
// Python has asked before whether anything has to see the op and has allocated the results
// (fastquant/_native/fast_calls.py). A call that cannot do the work changes nothing and returns
// None: then the op does it, or says what is wrong with the arguments.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace fastquant {

using FastCall = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);

// How Python's method table wants a FastCall.
inline PyCFunction as_method(FastCall f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyObject* set_up_fast_calls(PyObject* self, PyObject* args);
PyObject* is_on_call(PyObject* self, PyObject* flag);
PyObject* observe_minmax_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_histogram_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* histogram_qparams_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fused_observe_fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fake_quantize_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
