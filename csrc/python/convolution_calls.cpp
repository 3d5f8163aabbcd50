#include "python/convolution_calls.h"

#include "cpu/depthwise.h"
#include "cpu/huge_pages.h"
#include "cpu/pointwise.h"
#include "cpu/tiled_convolution.h"
#include "cpu/winograd.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

// The memory of a tensor of fp32 or bf16 that is not empty, and its sizes.
struct Channels {
  explicit Channels(PyObject* object) : Channels(tensor(object)) {}

  explicit Channels(const DLTensor& t) : data(t.data), type(element(t)), numel(fastquant::numel(t)) {
    require(type == Element::f32 || type == Element::bf16);
    require(t.ndim == 4 && numel > 0 && data != nullptr);
    images = t.shape[0], channels = t.shape[1], height = t.shape[2], width = t.shape[3];
    positions = height * width;
    const int64_t c = channels, plane = positions;
    const int64_t contiguous[] = {c * plane, plane, width, 1}, channels_last[] = {c * plane, 1, width * c, c};
    is_contiguous = has_strides(t, contiguous), is_channels_last = has_strides(t, channels_last);
  }

  void* data;
  Element type;
  int64_t numel, images, channels, height, width, positions;
  bool is_contiguous, is_channels_last;
};

// A pointwise layer with these images and this weight.
struct PointwiseLayer {
  PointwiseLayer(const Channels& x, const Channels& y, const Channels& weight)
      : sizes{x.images, x.channels, y.channels, x.positions},
        channels_last(!(x.is_contiguous && y.is_contiguous)),
        type(x.type),
        elements(x.numel + y.numel) {
    require(x.images == y.images && x.positions == y.positions && y.type == type && weight.type == type);
    require(!channels_last || (x.is_channels_last && y.is_channels_last && type == Element::f32));
    require(weight.images == sizes.outputs && weight.channels == sizes.inputs && weight.positions == 1 &&
            weight.is_contiguous);
  }

  Pointwise sizes;
  bool channels_last;
  Element type;
  int64_t elements;
};

Channels new_memory(PyObject* object) {
  const Channels y(object);
  prefer_huge_pages(y.data, y.numel * (y.type == Element::f32 ? 4 : 2));
  return y;
}

// The memory of the bias of so many channels; null where there is none.
const void* bias_of(PyObject* object, int64_t channels, Element type) {
  if (object == Py_None) return nullptr;
  const Array bias = values(object, "bias");
  require(bias.type == type && bias.numel == channels);
  return bias.data;
}

// Calls f with a value of the type, which is fp32 or bf16.
template <class F>
void with_type(Element type, const F& f) {
  if (type == Element::f32) return f(float{});
  f(BFloat16{});
}

// The depthwise layer that x and the weight belong to.
DepthwiseLayer depthwise_layer(const Channels& x, const Channels& weight, int64_t stride) {
  const int64_t kernel = weight.width;
  require(weight.images == x.channels && weight.channels == 1 && weight.height == kernel);
  require((kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2));
  require(weight.type == x.type && x.is_contiguous && weight.is_contiguous);
  return {x.images, x.channels, x.height, x.width, kernel, stride};
}

void require_contiguous(const Channels& t, Element type, int64_t images, int64_t channels, int64_t height,
                        int64_t width) {
  require(t.type == type && t.is_contiguous);
  require(t.images == images && t.channels == channels && t.height == height && t.width == width);
}

void require_outputs(const Channels& y, const DepthwiseLayer& layer, Element type) {
  require_contiguous(y, type, layer.images, layer.channels, layer.rows(), layer.columns());
}

// The layer that images, their convolution by Winograd's algorithm, and the weight belong to.
WinogradLayer winograd_layer(const Channels& x, const Channels& y, const Channels& weight) {
  const bool channels_last = !(x.is_contiguous && y.is_contiguous);
  require(!channels_last || (x.is_channels_last && y.is_channels_last));
  require(x.type == Element::f32 && y.type == x.type && weight.type == x.type && weight.is_contiguous);
  require(x.images == y.images && x.height == y.height && x.width == y.width);
  require(weight.images == y.channels && weight.channels == x.channels);
  require(weight.height == 3 && weight.width == 3);
  return {x.images, x.channels, y.channels, x.height, x.width, channels_last};
}

// The layer that images, their convolution by tiles, and the weight belong to.
TiledLayer tiled_layer(const Channels& x, const Channels& y, const Channels& weight) {
  require(has_tiles() && x.type == Element::bf16 && y.type == x.type && weight.type == x.type);
  require(x.is_contiguous && y.is_contiguous && weight.is_contiguous);
  require(x.images == y.images && x.height == y.height && x.width == y.width);
  require(weight.images == y.channels && weight.channels == x.channels);
  require(weight.height == weight.width && (weight.width == 1 || weight.width == 3));
  return {x.images, x.channels, y.channels, x.height, x.width, weight.width};
}

BFloat16* bfloat16s(const Channels& t) { return static_cast<BFloat16*>(t.data); }

float* floats(const Channels& t) { return static_cast<float*>(t.data); }

// f(), without the lock of the interpreter: whether all results are finite.
template <class F>
PyObject* are_finite(int64_t elements, const F& f) {
  bool finite = false;
  {
    const WithoutGil released(elements);
    finite = f();
  }
  return PyBool_FromLong(finite);
}

}  // namespace

PyObject* pointwise_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const Channels x(args.next()), weight(args.next());
    const void* const bias = bias_of(args.next(), weight.images, x.type);
    const Channels y = new_memory(args.next());
    const PointwiseLayer layer(x, y, weight);
    const WithoutGil released(layer.elements);
    with_type(layer.type, [&](auto element) {
      using S = decltype(element);
      const auto* const in = static_cast<const S*>(x.data);
      const auto* const w = static_cast<const S*>(weight.data);
      const auto* const b = static_cast<const S*>(bias);
      auto* const out = static_cast<S*>(y.data);
      if constexpr (std::is_same_v<S, float>) {
        if (layer.channels_last) return pointwise_convolution_channels_last(layer.sizes, in, w, b, out);
      }
      pointwise_convolution(layer.sizes, in, w, b, out);
    });
  });
}

PyObject* pointwise_grad_input_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), weight(args.next()), grad_x = new_memory(args.next());
    const PointwiseLayer layer(grad_x, grad, weight);
    const WithoutGil released(layer.elements);
    with_type(layer.type, [&](auto element) {
      using S = decltype(element);
      const auto* const in = static_cast<const S*>(grad.data);
      const auto* const w = static_cast<const S*>(weight.data);
      auto* const out = static_cast<S*>(grad_x.data);
      if constexpr (std::is_same_v<S, float>) {
        if (layer.channels_last) return pointwise_grad_input_channels_last(layer.sizes, in, w, out);
      }
      pointwise_grad_input(layer.sizes, in, w, out);
    });
  });
}

PyObject* pointwise_grad_weight_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), x(args.next()), grad_weight(args.next());
    const PointwiseLayer layer(x, grad, grad_weight);
    const WithoutGil released(layer.elements);
    with_type(layer.type, [&](auto element) {
      using S = decltype(element);
      const auto* const of_y = static_cast<const S*>(grad.data);
      const auto* const in = static_cast<const S*>(x.data);
      auto* const out = static_cast<S*>(grad_weight.data);
      if constexpr (std::is_same_v<S, float>) {
        if (layer.channels_last) return pointwise_grad_weight_channels_last(layer.sizes, of_y, in, out);
      }
      pointwise_grad_weight(layer.sizes, of_y, in, out);
    });
  });
}

PyObject* depthwise_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 5, [](Arguments args) {
    const Channels x(args.next()), weight(args.next());
    const void* const bias = bias_of(args.next(), weight.images, x.type);
    const DepthwiseLayer layer = depthwise_layer(x, weight, integer(args.next()));
    const Channels y = new_memory(args.next());
    require_outputs(y, layer, x.type);
    const WithoutGil released(x.numel);
    with_type(x.type, [&](auto element) {
      using S = decltype(element);
      depthwise_convolution(layer, static_cast<const S*>(x.data), static_cast<const S*>(weight.data),
                            static_cast<const S*>(bias), static_cast<S*>(y.data));
    });
  });
}

PyObject* depthwise_convolution_backward_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 6, [](Arguments args) {
    const Channels grad(args.next()), x(args.next()), weight(args.next());
    const DepthwiseLayer layer = depthwise_layer(x, weight, integer(args.next()));
    require_outputs(grad, layer, x.type);
    // The memory of a gradient that is like `other`; null where none is needed.
    const auto gradient = [](PyObject* object, const Channels& other) -> void* {
      if (object == Py_None) return nullptr;
      const Channels t = new_memory(object);
      require_contiguous(t, other.type, other.images, other.channels, other.height, other.width);
      return t.data;
    };
    void* const grad_x = gradient(args.next(), x);
    void* const grad_weight = gradient(args.next(), weight);
    const WithoutGil released(x.numel);
    with_type(x.type, [&](auto element) {
      using S = decltype(element);
      depthwise_convolution_backward(layer, static_cast<const S*>(grad.data), static_cast<const S*>(x.data),
                                     static_cast<const S*>(weight.data), static_cast<S*>(grad_x),
                                     static_cast<S*>(grad_weight));
    });
  });
}

PyObject* winograd_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const Channels x(args.next()), weight(args.next());
    const auto* const bias = static_cast<const float*>(bias_of(args.next(), weight.images, Element::f32));
    const Channels y = new_memory(args.next());
    const WinogradLayer layer = winograd_layer(x, y, weight);
    return are_finite(x.numel,
                      [&] { return winograd_convolution(layer, floats(x), floats(weight), bias, floats(y)); });
  });
}

PyObject* winograd_grad_input_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), weight(args.next()), grad_x = new_memory(args.next());
    const WinogradLayer layer = winograd_layer(grad_x, grad, weight);
    return are_finite(grad.numel,
                      [&] { return winograd_grad_input(layer, floats(grad), floats(weight), floats(grad_x)); });
  });
}

PyObject* winograd_grad_weight_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), x(args.next()), grad_weight(args.next());
    const WinogradLayer layer = winograd_layer(x, grad, grad_weight);
    return are_finite(
        x.numel, [&] { return winograd_grad_weight(layer, floats(grad), floats(x), floats(grad_weight)); });
  });
}

PyObject* tiled_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const Channels x(args.next()), weight(args.next());
    const auto* const bias = static_cast<const BFloat16*>(bias_of(args.next(), weight.images, Element::bf16));
    const Channels y = new_memory(args.next());
    const TiledLayer layer = tiled_layer(x, y, weight);
    return are_finite(
        x.numel, [&] { return tiled_convolution(layer, bfloat16s(x), bfloat16s(weight), bias, bfloat16s(y)); });
  });
}

PyObject* tiled_grad_input_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), weight(args.next()), grad_x = new_memory(args.next());
    const TiledLayer layer = tiled_layer(grad_x, grad, weight);
    return are_finite(grad.numel, [&] {
      return tiled_grad_input(layer, bfloat16s(grad), bfloat16s(weight), bfloat16s(grad_x));
    });
  });
}

PyObject* tiled_grad_weight_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 3, [](Arguments args) {
    const Channels grad(args.next()), x(args.next()), grad_weight(args.next());
    const TiledLayer layer = tiled_layer(x, grad, grad_weight);
    return are_finite(x.numel, [&] {
      return tiled_grad_weight(layer, bfloat16s(grad), bfloat16s(x), bfloat16s(grad_weight));
    });
  });
}

}  // namespace fastquant
