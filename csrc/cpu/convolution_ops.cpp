// Registers the CPU implementations of the ops `convolution` and `convolution_backward`.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../tensors.h"
#include "depthwise.h"
#include "huge_pages.h"
#include "pointwise.h"
#include "winograd.h"

namespace fastquant {
namespace {

// x and weight of a convolution that there are kernels for, contiguous, and what follows from their sizes.
struct Layer {
  Layer(const Tensor& input, const Tensor& kernels, int64_t step) : stride(step) {
    check(input.is_cpu() && kernels.is_cpu(), "x and weight must be on the CPU");
    const ScalarType dtype = input.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16");
    check(kernels.scalar_type() == dtype, "weight must have the dtype of x");
    check(input.dim() == 4 && kernels.dim() == 4, "x and weight must have 4 dimensions, have ", input.dim(),
          " and ", kernels.dim());
    x = torch::stable::contiguous(input), weight = torch::stable::contiguous(kernels);
    const auto w = weight.sizes();
    images = x.sizes()[0], inputs = x.sizes()[1], outputs = w[0], height = x.sizes()[2], width = x.sizes()[3];
    kernel = w[3];
    is_pointwise = kernel == 1 && w[2] == 1 && w[1] == inputs && stride == 1;
    const bool is_depthwise = (kernel == 3 || kernel == 5 || kernel == 7) && w[2] == kernel && w[1] == 1 &&
                              outputs == inputs && (stride == 1 || stride == 2);
    is_winograd = !is_depthwise && kernel == 3 && w[2] == 3 && w[1] == inputs && stride == 1 &&
                  dtype == ScalarType::Float;
    check(
        is_pointwise || is_depthwise || is_winograd,
        "there are kernels for weights of [outputs, inputs, 1, 1] with stride 1, for weights of [channels, 1, "
        "n, n] with n of 3, 5 or 7 and stride 1 or 2, and, in float32, for weights of [outputs, inputs, 3, 3] "
        "with stride 1; weight has the shape [",
        w[0], ", ", w[1], ", ", w[2], ", ", w[3], "], x has ", inputs, " channels, and the stride is ", stride);
  }

  Pointwise pointwise() const { return {images, inputs, outputs, height * width}; }
  WinogradLayer winograd() const { return {images, inputs, outputs, height, width, false}; }
  DepthwiseLayer depthwise() const { return {images, inputs, height, width, kernel, stride}; }
  bool is_empty() const { return x.numel() == 0 || weight.numel() == 0; }

  std::vector<int64_t> output_sizes() const {
    return {images, outputs, (height + stride - 1) / stride, (width + stride - 1) / stride};
  }

  Tensor x, weight;
  int64_t images, inputs, outputs, height, width, kernel, stride;
  bool is_pointwise, is_winograd;
};

Tensor new_contiguous(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  Tensor y =
      empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), like.scalar_type(), like);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * static_cast<int64_t>(y.element_size()));
  return y;
}

// Calls f with a value of the type that the layer's tensors have.
template <class F>
void with_type(const Layer& layer, const F& f) {
  if (layer.x.scalar_type() == ScalarType::Float) return f(float{});
  f(BFloat16{});
}

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
S* new_data(Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// torch's own 3x3 convolution, for what Winograd's algorithm finds not to be finite.
Tensor convolution_of_torch(const Layer& layer, const std::optional<Tensor>& bias) {
  const int64_t ones[] = {1, 1}, zeros[] = {0, 0};
  AtenTensorHandle of_bias = bias.has_value() ? bias->get() : nullptr, y = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(layer.x.get(), layer.weight.get(),
                                                    bias.has_value() ? &of_bias : nullptr, ones, 2, ones, 2,
                                                    ones, 2, 0, zeros, 2, 1, &y));
  return torch::stable::contiguous(Tensor(y));
}

// The same for the gradients of x and weight; those that are not needed are undefined.
std::tuple<Tensor, Tensor> gradients_of_torch(const Layer& layer, const Tensor& grad, bool of_x,
                                              bool of_weight) {
  const int64_t ones[] = {1, 1}, zeros[] = {0, 0};
  const int32_t needed[] = {of_x, of_weight, 0};
  AtenTensorHandle grad_x = nullptr, grad_weight = nullptr, grad_bias = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(grad.get(), layer.x.get(), layer.weight.get(),
                                                             nullptr, 0, ones, 2, ones, 2, ones, 2, 0, zeros, 2,
                                                             1, needed, 3, &grad_x, &grad_weight, &grad_bias));
  const Tensor unused(grad_bias);
  return {Tensor(grad_x), Tensor(grad_weight)};
}

Tensor convolution_op(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, int64_t stride) {
  const Layer layer(x, weight, stride);
  if (bias.has_value()) {
    check(bias->is_cpu() && bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
              bias->numel() == layer.outputs,
          "bias must be contiguous, with ", layer.outputs, " elements of the dtype of x");
  }
  Tensor y = new_contiguous(layer.output_sizes(), x);
  if (layer.is_empty()) return torch::stable::zero_(y);
  if (layer.is_winograd) {
    const bool finite =
        winograd_convolution(layer.winograd(), data<float>(layer.x), data<float>(layer.weight),
                             bias.has_value() ? data<float>(*bias) : nullptr, new_data<float>(y));
    return finite ? y : convolution_of_torch(layer, bias);
  }
  with_type(layer, [&](auto type) {
    using S = decltype(type);
    const S *const in = data<S>(layer.x), *const w = data<S>(layer.weight);
    const S* const b = bias.has_value() ? data<S>(*bias) : nullptr;
    if (layer.is_pointwise) return pointwise_convolution(layer.pointwise(), in, w, b, new_data<S>(y));
    depthwise_convolution(layer.depthwise(), in, w, b, new_data<S>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> convolution_backward_op(const Tensor given, const Tensor x, const Tensor weight,
                                                   int64_t stride, bool of_x, bool of_weight) {
  const Layer layer(x, weight, stride);
  const Tensor grad = torch::stable::contiguous(given);
  const auto sizes = layer.output_sizes();
  check(grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
            std::equal(sizes.begin(), sizes.end(), grad.sizes().begin()),
        "grad must have the dtype of x and the shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
        sizes[3], "]");
  const std::vector<int64_t> none = {0};
  const auto shape = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  Tensor grad_x = new_contiguous(of_x ? shape(layer.x) : none, x);
  Tensor grad_weight = new_contiguous(of_weight ? shape(layer.weight) : none, x);
  if (layer.is_empty()) return {torch::stable::zero_(grad_x), torch::stable::zero_(grad_weight)};
  if (layer.is_winograd) {
    const float *const g = data<float>(grad), *const in = data<float>(layer.x),
                       *const w = data<float>(layer.weight);
    const bool finite =
        (!of_x || winograd_grad_input(layer.winograd(), g, w, new_data<float>(grad_x))) &&
        (!of_weight || winograd_grad_weight(layer.winograd(), g, in, new_data<float>(grad_weight)));
    if (finite) return {grad_x, grad_weight};
    const auto [torchs_x, torchs_weight] = gradients_of_torch(layer, grad, of_x, of_weight);
    return {of_x ? torch::stable::contiguous(torchs_x) : grad_x,
            of_weight ? torch::stable::contiguous(torchs_weight) : grad_weight};
  }
  with_type(layer, [&](auto type) {
    using S = decltype(type);
    const S *const g = data<S>(grad), *const in = data<S>(layer.x), *const w = data<S>(layer.weight);
    if (layer.is_pointwise) {
      if (of_x) pointwise_grad_input(layer.pointwise(), g, w, new_data<S>(grad_x));
      if (of_weight) pointwise_grad_weight(layer.pointwise(), g, in, new_data<S>(grad_weight));
      return;
    }
    depthwise_convolution_backward(layer.depthwise(), g, in, w, of_x ? new_data<S>(grad_x) : nullptr,
                                   of_weight ? new_data<S>(grad_weight) : nullptr);
  });
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("convolution", TORCH_BOX(&convolution_op));
  m.impl("convolution_backward", TORCH_BOX(&convolution_backward_op));
}

}  // namespace fastquant
