#include "python/depthwise_calls.h"

#include "cpu/depthwise.h"
#include "cpu/huge_pages.h"
#include "python/arguments.h"

namespace fastquant {
namespace {

// Calls f with an element of the type that the tensors have.
template <class F>
void with_depthwise_type(Element type, const F& f) {
  require(type == Element::f32 || type == Element::bf16);
  if (type == Element::f32) return f(float());
  f(BFloat16());
}

// The layer that x and weight belong to.
DepthwiseLayer layer_of(const DLTensor& x, const DLTensor& weight, int64_t stride) {
  require(x.ndim == 4 && weight.ndim == 4);
  const int64_t kernel = weight.shape[3];
  require(weight.shape[0] == x.shape[1] && weight.shape[1] == 1 && weight.shape[2] == kernel);
  require((kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2));
  return {x.shape[0], x.shape[1], x.shape[2], x.shape[3], kernel, stride};
}

// The memory of a contiguous tensor of the layer's inputs or outputs.
void* images(PyObject* object, const DepthwiseLayer& layer, Element type, int64_t rows, int64_t columns) {
  const Array t = values(object, "images");
  const DLTensor sizes = tensor(object);
  require(t.type == type && sizes.ndim == 4 && sizes.shape[0] == layer.images);
  require(sizes.shape[1] == layer.channels && sizes.shape[2] == rows && sizes.shape[3] == columns);
  return t.data;
}

void* inputs(PyObject* object, const DepthwiseLayer& layer, Element type) {
  return images(object, layer, type, layer.height, layer.width);
}

void* outputs(PyObject* object, const DepthwiseLayer& layer, Element type) {
  return images(object, layer, type, layer.rows(), layer.columns());
}

}  // namespace

PyObject* depthwise_convolution_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 5, [](Arguments args) {
    PyObject *const input = args.next(), *const weights = args.next(), *const biases = args.next();
    const DLTensor t = tensor(input);
    const DepthwiseLayer layer = layer_of(t, tensor(weights), integer(args.next()));
    const Array weight = values(weights, "weight");
    const bool has_bias = biases != Py_None;
    const Array bias = has_bias ? values(biases, "bias") : Array{};
    require(weight.type == element(t) &&
            (!has_bias || (bias.type == element(t) && bias.numel == layer.channels)));
    const void* const x = inputs(input, layer, element(t));
    PyObject* const result = args.next();
    void* const y = outputs(result, layer, element(t));
    const auto w = read_values<float>(weight);
    const auto b = has_bias ? read_values<float>(bias) : std::vector<float>();
    with_depthwise_type(element(t), [&](auto type) {
      using S = decltype(type);
      const int64_t n = layer.images * layer.channels * layer.rows() * layer.columns();
      prefer_huge_pages(y, n * static_cast<int64_t>(sizeof(S)));
      const WithoutGil released(numel(t));
      depthwise_convolution(layer, static_cast<const S*>(x), w.data(), has_bias ? b.data() : nullptr,
                            static_cast<S*>(y));
    });
  });
}

PyObject* depthwise_convolution_backward_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return attempt(given, count, 6, [](Arguments args) {
    PyObject *const gradient = args.next(), *const input = args.next(), *const weights = args.next();
    const DLTensor t = tensor(input);
    const DepthwiseLayer layer = layer_of(t, tensor(weights), integer(args.next()));
    const Array weight = values(weights, "weight");
    require(weight.type == element(t));
    const void *const grad = outputs(gradient, layer, element(t)), *const x = inputs(input, layer, element(t));
    PyObject *const of_input = args.next(), *const of_weight = args.next();
    void* const grad_x = of_input == Py_None ? nullptr : inputs(of_input, layer, element(t));
    const Array grad_weight = of_weight == Py_None ? Array{} : values(of_weight, "grad_weight");
    require(of_weight == Py_None || (grad_weight.type == weight.type && grad_weight.numel == weight.numel));
    const auto w = read_values<float>(weight);
    std::vector<float> sums(of_weight == Py_None ? 0 : weight.numel);
    with_depthwise_type(element(t), [&](auto type) {
      using S = decltype(type);
      if (grad_x != nullptr) prefer_huge_pages(grad_x, numel(t) * static_cast<int64_t>(sizeof(S)));
      const WithoutGil released(numel(t));
      depthwise_convolution_backward(layer, static_cast<const S*>(grad), static_cast<const S*>(x), w.data(),
                                     static_cast<S*>(grad_x), sums.empty() ? nullptr : sums.data());
    });
    if (!sums.empty()) write_values(grad_weight, sums);
  });
}

}  // namespace fastquant
