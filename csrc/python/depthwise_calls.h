// Depthwise convolutions and their gradients, for layers in training.
#pragma once

#include "python/fast_calls.h"

namespace fastquant {

PyObject* depthwise_convolution_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* depthwise_convolution_backward_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
