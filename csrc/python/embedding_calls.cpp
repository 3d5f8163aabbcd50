#include "python/embedding_calls.h"

#include "cpu/quantized/embedding.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

EmbeddingTable table_of(Arguments* args) {
  const DLTensor t = tensor(args->next());
  const int64_t dim = integer(args->next()), bits = integer(args->next());
  const int64_t row_bytes = embedding_row_bytes(dim, bits);
  require(t.code == kUnsigned && t.bits == 8 && t.ndim == 2 && t.data != nullptr);
  require(t.shape[1] == row_bytes && t.strides[0] == row_bytes && t.strides[1] == 1);
  return {static_cast<const uint8_t*>(t.data), t.shape[0], dim, bits};
}

// Contiguous, and not empty.
Integers1d integers(PyObject* object) {
  const Array a = values(object, "");
  return {a.data, a.type, a.numel};
}

float* output(PyObject* object, int64_t rows, int64_t dim) {
  const Array y = values(object, "y");
  require(y.type == Element::f32 && y.numel == rows * dim);
  return static_cast<float*>(y.data);
}

}  // namespace

PyObject* quantized_embedding_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 5, [](Arguments args) {
    const EmbeddingTable table = table_of(&args);
    const Integers1d indices = integers(args.next());
    float* const y = output(args.next(), indices.count, table.dim);
    const WithoutGil released(indices.count * table.dim);
    embedding(table, indices, y);
  });
}

PyObject* quantized_embedding_bag_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 11, [](Arguments args) {
    const EmbeddingTable table = table_of(&args);
    PyObject* const object = args.next();
    const Integers1d indices = integers(object);
    PyObject *const offsets = args.next(), *const weights = args.next(), *const mapping = args.next();
    const int64_t mode = integer(args.next());
    const bool ends = boolean(args.next());
    const std::optional<int64_t> padding = optional_integer(args.next());
    require(0 <= mode && mode <= 2);
    const Integers1d none = {nullptr, Element::i64, 0};
    Bags bags = {none, 0, 0, ends, nullptr, none, static_cast<BagMode>(mode), padding};
    const DLTensor shape = tensor(object);
    require(shape.ndim == (offsets == Py_None ? 2 : 1));
    if (offsets == Py_None) {
      bags.count = shape.shape[0];
      bags.size = shape.shape[1];
    } else {
      require(tensor(offsets).ndim == 1);
      bags.offsets = integers(offsets);
      bags.count = bags.offsets.count - ends;
    }
    if (weights != Py_None) {
      const Array w = values(weights, "");
      require(w.type == Element::f32 && w.numel == indices.count && bags.mode == BagMode::sum);
      bags.weights = static_cast<const float*>(w.data);
    }
    if (mapping != Py_None) {
      require(tensor(mapping).ndim == 1);
      bags.mapping = integers(mapping);
    }
    float* const y = output(args.next(), bags.count, table.dim);
    const WithoutGil released(indices.count * table.dim);
    embedding_bag(table, indices, bags, y);
  });
}

}  // namespace fastquant
