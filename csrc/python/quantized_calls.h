// Functions that do the work of layers on quantized tensors without torch's dispatcher: from quantized tensors
// to quantized tensors. A tensor that torch makes takes longer than a small layer; these functions make their
// results through DLPack, in memory of their own.
//
// As with fast_calls.h, the caller makes sure that nothing has to see the op, and calls the op where a function
// returns None.
#pragma once

#include "python/fast_calls.h"

namespace fastquant {

PyObject* set_up_quantized_calls(PyObject* self, PyObject* args);
PyObject* quantized_conv_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_conv_transpose_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_linear_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_add_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_mul_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_cat_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* lookup_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_clamp_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* dequantize_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* dynamic_linear_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_max_pool_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_avg_pool_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_adaptive_avg_pool_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
