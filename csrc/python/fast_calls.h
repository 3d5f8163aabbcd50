// The ops without torch's dispatcher, which takes longer than to look at a small tensor.
//
// Memory is reached through the DLPack C exchange API that torch.Tensor has in newer releases. A
// call that finds anything but plain CPU tensors and plain circumstances does nothing and
// returns None; the op then does the work, or says what is wrong with the arguments.
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
PyObject* observe_minmax_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_histogram_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* histogram_qparams_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* observe_fake_quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* mask_gradient_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
