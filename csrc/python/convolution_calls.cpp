#include "python/convolution_calls.h"

#include "cpu/huge_pages.h"
#include "cpu/pointwise.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

// The memory of a tensor of fp32 or bf16 that is not empty, and its sizes.
struct Channels {
  explicit Channels(PyObject* object) : Channels(tensor(object)) {}

  explicit Channels(const DLTensor& t) : data(t.data), type(element(t)), numel(fastquant::numel(t)) {
    require(type == Element::f32 || type == Element::bf16);
    require(t.ndim == 4 && numel > 0 && data != nullptr);
    images = t.shape[0], channels = t.shape[1], positions = t.shape[2] * t.shape[3];
    const int64_t w = t.shape[3], c = channels, plane = positions;
    const int64_t contiguous[] = {c * plane, plane, w, 1}, channels_last[] = {c * plane, 1, w * c, c};
    is_contiguous = has_strides(t, contiguous), is_channels_last = has_strides(t, channels_last);
  }

  void* data;
  Element type;
  int64_t numel, images, channels, positions;
  bool is_contiguous, is_channels_last;
};

// A layer with these images and this weight.
struct Layer {
  Layer(const Channels& x, const Channels& y, const Channels& weight)
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

// Calls f with a value of the type that a layer's tensors have.
template <class F>
void with_type(const Layer& layer, const F& f) {
  if (layer.type == Element::f32) return f(float{});
  f(BFloat16{});
}

}  // namespace

PyObject* pointwise_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 4, [](Arguments args) {
    const Channels x(args.next()), weight(args.next());
    PyObject* const bias = args.next();
    const Channels y = new_memory(args.next());
    const Layer layer(x, y, weight);
    const void* biases = nullptr;
    if (bias != Py_None) {
      const Array of_outputs = values(bias, "bias");
      require(of_outputs.type == layer.type && of_outputs.numel == layer.sizes.outputs);
      biases = of_outputs.data;
    }
    const WithoutGil released(layer.elements);
    with_type(layer, [&](auto element) {
      using S = decltype(element);
      const auto* const in = static_cast<const S*>(x.data);
      const auto* const w = static_cast<const S*>(weight.data);
      const auto* const b = static_cast<const S*>(biases);
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
    const Layer layer(grad_x, grad, weight);
    const WithoutGil released(layer.elements);
    with_type(layer, [&](auto element) {
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
    const Layer layer(x, grad, grad_weight);
    const WithoutGil released(layer.elements);
    with_type(layer, [&](auto element) {
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

}  // namespace fastquant
