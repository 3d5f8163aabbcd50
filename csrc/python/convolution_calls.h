// Convolutions of QAT modules and their gradients (../cpu/pointwise.h, ../cpu/depthwise.h,
// ../cpu/winograd.h, ../cpu/tiled_convolution.h) on tensors; see fast_calls.h.
#pragma once

#include "python/fast_calls.h"

namespace fastquant {

PyObject* pointwise_convolution_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* pointwise_grad_input_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* pointwise_grad_weight_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* depthwise_convolution_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* depthwise_convolution_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* winograd_convolution_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* winograd_grad_input_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* winograd_grad_weight_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* tiled_convolution_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* tiled_grad_input_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* tiled_grad_weight_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
