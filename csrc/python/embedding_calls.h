// The ops of embeddings without torch's dispatcher; see fast_calls.h.
#pragma once

#include "python/fast_calls.h"

namespace fastquant {

PyObject* quantized_embedding_call(PyObject* self, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_embedding_bag_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace fastquant
