#include "python/quantized_calls.h"

#include <cmath>
#include <new>

#include "cpu/huge_pages.h"
#include "cpu/quantized/dynamic.h"
#include "cpu/quantized/elementwise.h"
#include "cpu/quantized/geometry.h"
#include "cpu/quantized/packing.h"
#include "cpu/quantized/pooling.h"
#include "cpu/quantized/transposed.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

constexpr int64_t kMostDims = 8;

// Set once, by set_up_quantized_calls, and kept for the life of the process.
PyTypeObject* quantized_type = nullptr;
PyObject *empty_strided = nullptr, *as_float32 = nullptr;  // torch's, and its keyword arguments
PyObject *class_name = nullptr, *scale_name = nullptr, *zero_point_name = nullptr;

// ------------------------------------------------------------------------- arguments

bool is_int8(const DLTensor& t) {
  require(t.bits == 8 && (t.code == kInt || t.code == kUnsigned));
  return t.code == kInt;
}

// A quantized tensor that is not empty.
struct Quantized {
  DLTensor t;
  double scale;
  int64_t zero_point;
  bool is_signed;

  const uint8_t* data() const { return static_cast<const uint8_t*>(t.data); }
  Quantization quantization() const { return {scale, zero_point, is_signed}; }
};

template <class F>
auto attribute(PyObject* object, PyObject* name, const F& convert) {
  PyObject* const value = PyObject_GetAttr(object, name);
  require(value != nullptr);
  try {
    const auto converted = convert(value);
    Py_DECREF(value);
    return converted;
  } catch (...) {
    Py_DECREF(value);
    throw;
  }
}

Quantized quantized(PyObject* object) {
  require(Py_TYPE(object) == quantized_type);
  Quantized x;
  x.t = memory(object);
  x.is_signed = is_int8(x.t);
  x.scale = attribute(object, scale_name, [](PyObject* value) { return real(value); });
  x.zero_point = attribute(object, zero_point_name, [](PyObject* value) { return integer(value); });
  require(x.t.data != nullptr && numel(x.t) > 0 && x.t.ndim <= kMostDims && x.scale > 0);
  return x;
}

struct Integers {
  int64_t values[kMostDims];
  int64_t count;

  operator SpatialSizes() const { return {values, count}; }
  // That of a spatial dimension, where the last of three dimensions have one.
  int64_t at(int k, int64_t otherwise) const {
    const int64_t i = k - (kPoolDims - count);
    return i < 0 ? otherwise : values[i];
  }
};

Integers integers(PyObject* object) {
  const bool is_tuple = PyTuple_Check(object);
  require(is_tuple || PyList_Check(object));
  Integers result;
  result.count = is_tuple ? PyTuple_Size(object) : PyList_Size(object);
  require(result.count <= kMostDims);
  for (int64_t i = 0; i < result.count; ++i) {
    result.values[i] = integer(is_tuple ? PyTuple_GetItem(object, i) : PyList_GetItem(object, i));
  }
  return result;
}

// What pooling along so many dimensions takes: a number for each, or one for all.
Integers spans(PyObject* object, int64_t dims) {
  Integers result;
  if (PyLong_Check(object)) {
    result.count = 1;
    result.values[0] = integer(object);
  } else {
    result = integers(object);
  }
  if (result.count == 1) std::fill_n(result.values, dims, result.values[0]);
  require(result.count == 1 || result.count == dims);
  result.count = dims;
  return result;
}

int64_t pooled_dims(PyObject* object) {
  const int64_t dims = integer(object);
  require(1 <= dims && dims <= kPoolDims);
  return dims;
}

// The stride of windows, which is their size if none is given.
Integers stride_of(PyObject* object, const Integers& kernel) {
  return object == Py_None ? kernel : spans(object, kernel.count);
}

// What a layer's output is to be, as objects, which a quantized tensor has as attributes, and as numbers.
struct OutputQParams {
  explicit OutputQParams(Arguments* args) : scale_object(args->next()), zero_point_object(args->next()) {
    require(PyFloat_Check(scale_object) && PyLong_Check(zero_point_object));
    scale = real(scale_object);
    zero_point = integer(zero_point_object);
    require(scale > 0 && std::isfinite(scale));
  }

  PyObject *scale_object, *zero_point_object;
  double scale;
  int64_t zero_point;
};

struct Bounds {
  explicit Bounds(Arguments* args) : low(real(args->next())), high(real(args->next())) {}
  double low, high;
};

// --------------------------------------------------------------------------- results

// Memory for a new tensor of bytes.
class NewBytes {
 public:
  NewBytes(int64_t dims, const int64_t* sizes, const int64_t* strides, bool is_signed) {
    int64_t bytes = 1;
    for (int64_t d = 0; d < dims; ++d) bytes *= sizes[d];
    require(quantized_type != nullptr && bytes > 0 && dims <= kMostDims);
    block_ = static_cast<Block*>(::operator new(kHeader + static_cast<size_t>(bytes), kAlignment));
    *block_ = {{exchange->major, exchange->minor, nullptr, free_block, 0, {}}, {}, {}};
    std::copy_n(sizes, dims, block_->sizes);
    std::copy_n(strides, dims, block_->strides);
    block_->managed.tensor = {
        data(),          kCpu, 0, static_cast<int32_t>(dims), is_signed ? kInt : kUnsigned, 8, 1, block_->sizes,
        block_->strides, 0};
    prefer_huge_pages(data(), bytes);
  }
  ~NewBytes() {
    if (block_ != nullptr) free_block(&block_->managed);
  }
  NewBytes(const NewBytes&) = delete;
  NewBytes& operator=(const NewBytes&) = delete;

  uint8_t* data() { return reinterpret_cast<uint8_t*>(block_) + kHeader; }

  // The quantized tensor of these bytes.
  PyObject* quantized(PyObject* scale, PyObject* zero_point) {
    void* made = nullptr;
    const int failed = exchange->managed_tensor_to_py_object_no_sync(&block_->managed, &made);
    block_ = nullptr;
    require(failed == 0);
    PyObject* const result = static_cast<PyObject*>(made);
    if (PyObject_SetAttr(result, class_name, reinterpret_cast<PyObject*>(quantized_type)) != 0 ||
        PyObject_SetAttr(result, scale_name, scale) != 0 ||
        PyObject_SetAttr(result, zero_point_name, zero_point) != 0) {
      Py_DECREF(result);
      throw NeedsOp();
    }
    return result;
  }
  PyObject* quantized(const OutputQParams& q) { return quantized(q.scale_object, q.zero_point_object); }
  // With the attributes of another one.
  PyObject* quantized_as(PyObject* x) {
    PyObject* const scale = PyObject_GetAttr(x, scale_name);
    PyObject* const zero_point = PyObject_GetAttr(x, zero_point_name);
    PyObject* const result = scale != nullptr && zero_point != nullptr ? quantized(scale, zero_point) : nullptr;
    Py_XDECREF(scale);
    Py_XDECREF(zero_point);
    require(result != nullptr);
    return result;
  }

 private:
  // In front of the bytes.
  struct Block {
    DLManagedTensor managed;
    int64_t sizes[kMostDims], strides[kMostDims];
  };
  static constexpr std::align_val_t kAlignment{64};
  static constexpr size_t kHeader = (sizeof(Block) + 63) / 64 * 64;

  static void free_block(DLManagedTensor* managed) { ::operator delete(managed, kAlignment); }

  Block* block_;
};

// ---------------------------------------------------------------------------- layers

// A layer's packed weight, its scales and its bias.
struct LayerWeights {
  explicit LayerWeights(Arguments* args) {
    const DLTensor t = tensor(args->next());
    require(t.code == kUnsigned && t.bits == 8 && t.ndim == 1 && (t.strides[0] == 1 || t.shape[0] == 1));
    packed = static_cast<const uint8_t*>(t.data);
    bytes = t.shape[0];
    scale = floats(args->next(), &scales);
    PyObject* const given = args->next();
    if (given != Py_None) bias = floats(given, &biases);
  }

  // Those of a weight with this layout.
  LayerScales checked(const PackedLayout& layout, int64_t channels) const {
    require(bytes == layout.bytes() && (scales == 1 || scales == channels));
    require(bias == nullptr || biases == channels);
    return {scale, scales != 1, bias};
  }

  static const float* floats(PyObject* object, int64_t* count) {
    const Array a = buffer(object, "");
    require(a.type == Element::f32);
    *count = a.numel;
    return static_cast<const float*>(a.data);
  }

  const uint8_t* packed;
  const float* scale;
  const float* bias = nullptr;
  int64_t bytes, scales, biases = 0;
};

OutputFormat format_of(void* data, bool is_signed, const OutputQParams& q, const Bounds& bounds) {
  return {data, is_signed ? OutputType::s8 : OutputType::u8, q.scale, q.zero_point, bounds.low, bounds.high};
}

QuantizedValues values_of(const Quantized& x) { return {x.data(), x.scale, x.zero_point, x.is_signed}; }

// What `convolve` makes of x; scale, zero point and bounds of the output are the next arguments.
PyObject* convolved(void (*convolve)(const QuantizedValues&, const ConvShape&, const uint8_t*,
                                     const LayerScales&, const OutputFormat&),
                    const Quantized& x, const ConvShape& shape, const PackedLayout& layout,
                    const LayerWeights& weights, Arguments* args) {
  const OutputQParams q(args);
  const Bounds bounds(args);
  const int64_t dims = x.t.ndim;
  require(has_channels_last(dims, x.t.shape, x.t.strides));
  const LayerScales scales = weights.checked(layout, shape.out_channels);
  int64_t sizes[kMaxLayerDims], strides[kMaxLayerDims];
  conv_output_sizes(shape, dims, sizes);
  channels_last_strides(dims, sizes, strides);
  NewBytes y(dims, sizes, strides, x.is_signed);
  {
    const WithoutGil released(std::max(shape.positions() * shape.out_channels, weights.bytes));
    convolve(values_of(x), shape, weights.packed, scales, format_of(y.data(), x.is_signed, q, bounds));
  }
  return y.quantized(q);
}

bool is_contiguous(const DLTensor& t) {
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; stride *= t.shape[d--]) {
    if (t.shape[d] != 1 && t.strides[d] != stride) return false;
  }
  return true;
}

// The shapes of a linear layer's weight and of its contiguous output.
struct RowsOfOutput {
  RowsOfOutput(const DLTensor& x, int64_t out_features)
      : rows(1), weight_shape{out_features, x.shape[x.ndim - 1]} {
    const int64_t last = x.ndim - 1;
    for (int64_t d = last, step = 1; d >= 0; --d) {
      sizes[d] = d == last ? out_features : x.shape[d];
      strides[d] = step;
      step *= sizes[d];
      if (d != last) rows *= sizes[d];
    }
  }

  int64_t rows, weight_shape[2];
  int64_t sizes[kMostDims], strides[kMostDims];
};

PyObject* tuple_of(int64_t count, const int64_t* values) {
  PyObject* const tuple = PyTuple_New(count);
  for (int64_t i = 0; tuple != nullptr && i < count; ++i) {
    PyTuple_SetItem(tuple, i, PyLong_FromLongLong(values[i]));
  }
  return tuple;
}

// A new fp32 tensor that fill(memory) has filled; `work` counts the elements that this reads or writes.
template <class F>
PyObject* new_floats(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t work, const F& fill) {
  PyObject* const args = Py_BuildValue("(NN)", tuple_of(dims, sizes), tuple_of(dims, strides));
  require(args != nullptr);
  PyObject* const y = PyObject_Call(empty_strided, args, as_float32);
  Py_DECREF(args);
  require(y != nullptr);
  try {
    const DLTensor out = tensor(y);
    require(element(out) == Element::f32);
    const WithoutGil released(work);
    fill(out.data);
  } catch (...) {
    Py_DECREF(y);
    throw;
  }
  return y;
}

Dense dense_bytes(const DLTensor& t) {
  const View x = {t.data, Element::other, t.ndim, t.shape, t.strides, numel(t)};
  require(is_dense(x));
  return dense(x, std::nullopt);
}

template <Binary op>
PyObject* binary_call(PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 6, [](Arguments args) {
    const Quantized a = quantized(args.next()), b = quantized(args.next());
    const OutputQParams q(&args);
    const Bounds bounds(&args);
    require(a.is_signed == b.is_signed && a.t.ndim == b.t.ndim);
    // The op broadcasts the first operand.
    const int dims = a.t.ndim;
    int64_t b_strides[kMostDims];
    for (int d = 0; d < dims; ++d) {
      const bool same = b.t.shape[d] == a.t.shape[d];
      require(same || b.t.shape[d] == 1);
      b_strides[d] = same ? b.t.strides[d] : 0;
    }
    const int64_t n = dense_bytes(a.t).numel();
    NewBytes y(dims, a.t.shape, a.t.strides, a.is_signed);
    const auto [of_a, of_b] = operands_of(op, a.quantization(), b.quantization(), q.scale);
    const Output output = output_of({q.scale, q.zero_point, a.is_signed}, bounds.low, bounds.high);
    {
      const WithoutGil released(n);
      require(binary(op, dims, a.t.shape, {a.data(), a.t.strides}, of_a, {b.data(), b_strides}, of_b,
                     {y.data(), a.t.strides}, output));
    }
    return y.quantized(q);
  });
}

// --------------------------------------------------------------------------- pooling

// [images, channels, *spatial], with the channels last.
Images images_of(const Quantized& x, int64_t spatial) {
  const DLTensor& t = x.t;
  require(t.ndim == spatial + 2 && (t.shape[1] == 1 || t.strides[1] == 1));
  Images images = {x.data(), t.shape[0], t.shape[1], t.strides[0], {}, x.is_signed};
  for (int k = 0; k < kPoolDims; ++k) {
    const int64_t d = t.ndim - kPoolDims + k;
    images.strides[k] = d >= 2 ? t.strides[d] : 0;
  }
  return images;
}

int64_t pixels_along(const Quantized& x, int k) {
  const int64_t d = x.t.ndim - kPoolDims + k;
  return d >= 2 ? x.t.shape[d] : 1;
}

// Pools the images of x by pool(images, windows, out).
template <class F>
PyObject* pooled(PyObject* object, const Quantized& x, const Windows (&windows)[kPoolDims], int64_t spatial,
                 const F& pool) {
  const Images images = images_of(x, spatial);
  int64_t sizes[kMostDims] = {x.t.shape[0], x.t.shape[1]}, strides[kMostDims];
  for (int64_t d = 2; d < x.t.ndim; ++d) {
    sizes[d] = static_cast<int64_t>(windows[kPoolDims - x.t.ndim + d].begin.size());
  }
  channels_last_strides(x.t.ndim, sizes, strides);
  NewBytes y(x.t.ndim, sizes, strides, x.is_signed);
  {
    const WithoutGil released(numel(x.t));
    pool(images, windows, y.data());
  }
  return y.quantized_as(object);
}

}  // namespace

PyObject* set_up_quantized_calls(PyObject*, PyObject* args) {
  PyObject *type, *function, *keywords;
  if (!PyArg_ParseTuple(args, "O!OO!", &PyType_Type, &type, &function, &PyDict_Type, &keywords)) return nullptr;
  class_name = PyUnicode_InternFromString("__class__");
  scale_name = PyUnicode_InternFromString("_scale");
  zero_point_name = PyUnicode_InternFromString("_zero_point");
  if (class_name == nullptr || scale_name == nullptr || zero_point_name == nullptr) return nullptr;
  empty_strided = Py_NewRef(function);
  as_float32 = Py_NewRef(keywords);
  quantized_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
  Py_RETURN_NONE;
}

PyObject* quantized_conv_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 13, [](Arguments args) {
    const Quantized x = quantized(args.next());
    const LayerWeights weights(&args);
    const Integers weight_shape = integers(args.next()), stride = integers(args.next());
    const Integers padding = integers(args.next()), dilation = integers(args.next());
    const int64_t groups = integer(args.next());
    const ConvShape shape = conv_shape(
        x.t.ndim, x.t.shape, {weight_shape.values, weight_shape.count, stride, padding, dilation, groups});
    const PackedLayout layout(weight_shape.values, x.t.ndim, groups, false);
    return convolved(quantized_conv, x, shape, layout, weights, &args);
  });
}

PyObject* quantized_conv_transpose_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 14, [](Arguments args) {
    const Quantized x = quantized(args.next());
    const LayerWeights weights(&args);
    const Integers weight_shape = integers(args.next()), stride = integers(args.next());
    const Integers padding = integers(args.next()), output_padding = integers(args.next());
    const Integers dilation = integers(args.next());
    const int64_t groups = integer(args.next());
    const ConvShape shape = conv_transpose_shape(
        x.t.ndim, x.t.shape, {weight_shape.values, weight_shape.count, stride, padding, dilation, groups},
        output_padding);
    const PackedLayout layout(weight_shape.values, x.t.ndim, groups, true);
    return convolved(quantized_conv_transpose, x, shape, layout, weights, &args);
  });
}

PyObject* quantized_linear_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 10, [](Arguments args) {
    const Quantized x = quantized(args.next());
    const int64_t in_features = integer(args.next());
    const LayerWeights weights(&args);
    const int64_t out_features = integer(args.next());
    const OutputQParams q(&args);
    const Bounds bounds(&args);
    require(x.t.ndim >= 1 && is_contiguous(x.t) && x.t.shape[x.t.ndim - 1] == in_features);
    const RowsOfOutput out(x.t, out_features);
    const PackedLayout layout(out.weight_shape, 2, 1, false);
    const LayerScales scales = weights.checked(layout, out_features);
    NewBytes y(x.t.ndim, out.sizes, out.strides, x.is_signed);
    {
      const WithoutGil released(std::max(out.rows * out_features, weights.bytes));
      quantized_linear(values_of(x), out.rows, in_features, out_features, weights.packed, scales,
                       format_of(y.data(), x.is_signed, q, bounds));
    }
    return y.quantized(q);
  });
}

PyObject* quantized_add_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return binary_call<Binary::add>(given, count);
}

PyObject* quantized_mul_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return binary_call<Binary::mul>(given, count);
}

PyObject* quantized_cat_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 6, [](Arguments args) {
    PyObject* const tensors = args.next();
    const bool is_tuple = PyTuple_Check(tensors);
    require(is_tuple || PyList_Check(tensors));
    const int64_t n = is_tuple ? PyTuple_Size(tensors) : PyList_Size(tensors);
    constexpr int64_t kMost = 64;
    require(1 <= n && n <= kMost);
    int64_t dim = integer(args.next());
    const OutputQParams q(&args);
    const Bounds bounds(&args);
    Quantized parts[kMost];
    Slice slices[kMost];
    int64_t sizes[kMostDims], strides[kMostDims];
    for (int64_t i = 0; i < n; ++i) {
      parts[i] = quantized(is_tuple ? PyTuple_GetItem(tensors, i) : PyList_GetItem(tensors, i));
      const DLTensor& t = parts[i].t;
      if (i == 0) {
        dim = dim < 0 ? dim + t.ndim : dim;
        require(0 <= dim && dim < t.ndim && (t.ndim == 4 || t.ndim == 5));
        std::copy_n(t.shape, t.ndim, sizes);
        sizes[dim] = 0;
      }
      require(t.ndim == parts[0].t.ndim && parts[i].is_signed == parts[0].is_signed);
      require(has_channels_last(t.ndim, t.shape, t.strides));
      for (int d = 0; d < t.ndim; ++d) require(d == dim || t.shape[d] == sizes[d]);
      sizes[dim] += t.shape[dim];
      slices[i] = {t.shape, {parts[i].data(), t.strides}, operand_of(parts[i].quantization(), q.scale)};
    }
    const int dims = parts[0].t.ndim;
    const bool is_signed = parts[0].is_signed;
    channels_last_strides(dims, sizes, strides);
    NewBytes y(dims, sizes, strides, is_signed);
    const Output output = output_of({q.scale, q.zero_point, is_signed}, bounds.low, bounds.high);
    int64_t all = 1;
    for (int d = 0; d < dims; ++d) all *= sizes[d];
    {
      const WithoutGil released(all);
      require(concatenate(dims, dim, slices, n, {y.data(), strides}, output));
    }
    return y.quantized(q);
  });
}

PyObject* lookup_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const Quantized x = quantized(args.next());
    const DLTensor table = tensor(args.next());
    const OutputQParams q(&args);
    require(numel(table) == 256 && is_contiguous(table) && is_int8(table) == x.is_signed);
    const int64_t n = dense_bytes(x.t).numel();
    NewBytes y(x.t.ndim, x.t.shape, x.t.strides, x.is_signed);
    {
      const WithoutGil released(n);
      look_up(x.data(), n, static_cast<const uint8_t*>(table.data), y.data());
    }
    return y.quantized(q);
  });
}

PyObject* quantized_clamp_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    PyObject* const object = args.next();
    const Quantized x = quantized(object);
    const int64_t low = integer(args.next()), high = integer(args.next());
    const bool in_place = boolean(args.next());
    const int64_t n = dense_bytes(x.t).numel();
    require(-128 <= std::min(low, high) && std::max(low, high) <= 255);
    // In 16 bits, of which a vector has many.
    const auto least = static_cast<int16_t>(low), most = static_cast<int16_t>(high);
    const int16_t wrap = x.is_signed ? 256 : 0;
    uint8_t table[256];
    for (int16_t i = 0; i < 256; ++i) {
      const auto value = static_cast<int16_t>(i < 128 ? i : i - wrap);
      table[i] = static_cast<uint8_t>(std::min(std::max(value, least), most));
    }
    const auto clamp_to = [&](uint8_t* y) {
      const WithoutGil released(n);
      look_up(x.data(), n, table, y);
    };
    if (in_place) {
      clamp_to(static_cast<uint8_t*>(x.t.data));
      return Py_NewRef(object);
    }
    NewBytes y(x.t.ndim, x.t.shape, x.t.strides, x.is_signed);
    clamp_to(y.data());
    return y.quantized_as(object);
  });
}

PyObject* quantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const DLTensor x = tensor(args.next());
    const OutputQParams q(&args);
    const bool is_signed = boolean(args.next());
    const Quantization quantization = {q.scale, q.zero_point, is_signed};
    const int64_t n = numel(x);
    require(n > 0 && x.ndim <= kMostDims);
    const Element type = element(x);
    if (x.ndim < 3 || x.ndim > kMaxLayerDims || has_channels_last(x.ndim, x.shape, x.strides)) {
      const Dense values = dense(x, std::nullopt);
      NewBytes y(x.ndim, x.shape, x.strides, is_signed);
      {
        const WithoutGil released(n);
        quantize(values.data, type, n, quantization, y.data());
      }
      return y.quantized(q);
    }
    require(is_contiguous(x));
    int64_t strides[kMostDims];
    channels_last_strides(x.ndim, x.shape, strides);
    NewBytes y(x.ndim, x.shape, strides, is_signed);
    {
      const WithoutGil released(n);
      quantize_transposed(x.data, type, x.shape[0], x.shape[1], n / (x.shape[0] * x.shape[1]), quantization,
                          y.data());
    }
    return y.quantized(q);
  });
}

PyObject* dequantize_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 1, [](Arguments args) -> PyObject* {
    const Quantized x = quantized(args.next());
    const int64_t n = dense_bytes(x.t).numel();
    return new_floats(x.t.ndim, x.t.shape, x.t.strides, n,
                      [&](void* y) { dequantize(x.data(), n, x.quantization(), Element::f32, y); });
  });
}

PyObject* dynamic_linear_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    const DLTensor x = tensor(args.next());
    const int64_t in_features = integer(args.next());
    const LayerWeights weights(&args);
    const int64_t out_features = integer(args.next());
    const bool relu = boolean(args.next()), reduce_range = boolean(args.next());
    require(element(x) == Element::f32 && 1 <= x.ndim && x.ndim <= kMostDims);
    require(x.data != nullptr && numel(x) > 0 && is_contiguous(x) && x.shape[x.ndim - 1] == in_features);
    const RowsOfOutput y(x, out_features);
    const PackedLayout layout(y.weight_shape, 2, 1, false);
    const LayerScales scales = weights.checked(layout, out_features);
    return new_floats(x.ndim, y.sizes, y.strides, std::max(y.rows * out_features, weights.bytes),
                      [&](void* to) {
                        dynamic_linear(x.data, Element::f32, y.rows, in_features, out_features, weights.packed,
                                       scales, relu, reduce_range, to, OutputType::f32);
                      });
  });
}

PyObject* quantized_max_pool_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 7, [](Arguments args) {
    PyObject* const object = args.next();
    const Quantized x = quantized(object);
    const int64_t dims = pooled_dims(args.next());
    const Integers kernel = spans(args.next(), dims), stride = stride_of(args.next(), kernel);
    const Integers padding = spans(args.next(), dims), dilation = spans(args.next(), dims);
    const bool ceil_mode = boolean(args.next());
    Windows windows[kPoolDims];
    for (int k = 0; k < kPoolDims; ++k) {
      windows[k] = sliding_windows(pixels_along(x, k), kernel.at(k, 1), stride.at(k, 1), padding.at(k, 0),
                                   dilation.at(k, 1), ceil_mode, false);
    }
    return pooled(object, x, windows, dims,
                  [](const Images& images, const auto& w, uint8_t* out) { max_pool(images, w, out); });
  });
}

PyObject* quantized_avg_pool_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 8, [](Arguments args) {
    PyObject* const object = args.next();
    const Quantized x = quantized(object);
    const int64_t dims = pooled_dims(args.next());
    const Integers kernel = spans(args.next(), dims), stride = stride_of(args.next(), kernel);
    const Integers padding = spans(args.next(), dims);
    const bool ceil_mode = boolean(args.next()), count_include_pad = boolean(args.next());
    const std::optional<int64_t> divisor = optional_integer(args.next());
    require(divisor.value_or(1) != 0);
    Windows windows[kPoolDims];
    for (int k = 0; k < kPoolDims; ++k) {
      windows[k] = sliding_windows(pixels_along(x, k), kernel.at(k, 1), stride.at(k, 1), padding.at(k, 0), 1,
                                   ceil_mode, count_include_pad);
    }
    return pooled(object, x, windows, dims, [&](const Images& images, const auto& w, uint8_t* out) {
      average_pool(images, x.zero_point, w, divisor, out);
    });
  });
}

PyObject* quantized_adaptive_avg_pool_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    PyObject* const object = args.next();
    const Quantized x = quantized(object);
    const int64_t dims = pooled_dims(args.next());
    const Integers outputs = spans(args.next(), dims);
    Windows windows[kPoolDims];
    for (int k = 0; k < kPoolDims; ++k) {
      require(outputs.at(k, 1) > 0);
      windows[k] = adaptive_windows(pixels_along(x, k), outputs.at(k, 1));
    }
    return pooled(object, x, windows, dims, [&](const Images& images, const auto& w, uint8_t* out) {
      average_pool(images, x.is_signed ? -128 : 0, w, std::nullopt, out);
    });
  });
}

}  // namespace fastquant
