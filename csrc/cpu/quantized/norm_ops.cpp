// Registers the CPU implementations of norms and softmax of quantized tensors.
#include <torch/csrc/stable/library.h>

#include "../arrays.h"
#include "elementwise.h"
#include "normalization.h"
#include "quantized_tensors.h"

namespace fastquant {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::vector<double> values_of(const Tensor& t, int64_t count, const char* name) {
  const Tensor c = torch::stable::contiguous(t);
  check(t.is_cpu() && t.numel() == count, name, " must have ", count, " elements, has ", t.numel());
  return read_values<double>({c.mutable_data_ptr(), element(c.scalar_type()), count, name});
}

Affine affine_of(const OptionalTensor& weight, const OptionalTensor& bias, int64_t count) {
  Affine affine;
  if (weight.has_value()) affine.weight = values_of(*weight, count, "weight");
  if (bias.has_value()) affine.bias = values_of(*bias, count, "bias");
  return affine;
}

// x with its channels last in memory, in a copy if they are not, and a result for it.
struct ChannelsLast {
  explicit ChannelsLast(const Tensor& given) : x(given) {
    check(x.dim() >= 2 && x.dim() <= 5, "x must have 2 to 5 dimensions, got ", x.dim());
    const Shape sizes = sizes_of(x);
    const Shape strides = x.dim() == 2 ? contiguous_strides(sizes) : channels_last_strides(sizes);
    channels = x.size(1);
    pixels = x.size(0) * channels == 0 ? 0 : x.numel() / (x.size(0) * channels);
    if (!has_strides(x, strides)) {
      x = empty(sizes, strides, x.scalar_type(), given);
      const Tensor t = torch::stable::contiguous(given);
      transpose(bytes(t), t.size(0), channels, pixels, bytes(x));
    }
    y = empty(sizes, strides, x.scalar_type(), given);
  }

  Tensor x, y;
  int64_t channels, pixels;
};

Tensor batch_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, const OptionalTensor weight,
                     const OptionalTensor bias, const Tensor running_mean, const Tensor running_var, double eps,
                     double scale, int64_t zero_point, double low, double high) {
  ChannelsLast t(x);
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), low, high};
  batch_norm(bytes(t.x), x.size(0) * t.pixels, t.channels, quantization(x_scale, x_zero_point, x.scalar_type()),
             affine_of(weight, bias, t.channels), values_of(running_mean, t.channels, "running_mean"),
             values_of(running_var, t.channels, "running_var"), eps, output, bytes(t.y));
  return t.y;
}

Tensor group_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, int64_t groups,
                     const OptionalTensor weight, const OptionalTensor bias, double eps, double scale,
                     int64_t zero_point) {
  ChannelsLast t(x);
  check(groups > 0 && t.channels % groups == 0, "the ", t.channels, " channels of x cannot be divided into ",
        groups, " groups");
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), -INFINITY, INFINITY};
  if (x.numel() == 0) return t.y;
  group_norm(bytes(t.x), x.size(0), t.pixels, t.channels, groups,
             quantization(x_scale, x_zero_point, x.scalar_type()), affine_of(weight, bias, t.channels), eps,
             output, bytes(t.y));
  return t.y;
}

Tensor layer_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, const Shape normalized_shape,
                     const OptionalTensor weight, const OptionalTensor bias, double eps, double scale,
                     int64_t zero_point) {
  const size_t dims = static_cast<size_t>(x.dim()), more = dims - std::min(dims, normalized_shape.size());
  const Shape sizes = sizes_of(x);
  check(!normalized_shape.empty() && normalized_shape.size() <= dims &&
            std::equal(normalized_shape.begin(), normalized_shape.end(), sizes.begin() + more),
        "normalized_shape must be the last sizes of x");
  int64_t n = 1;
  for (int64_t size : normalized_shape) n *= size;
  const Tensor t = torch::stable::contiguous(x);
  Tensor y = empty(sizes, contiguous_strides(sizes), x.scalar_type(), x);
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), -INFINITY, INFINITY};
  if (x.numel() == 0) return y;
  layer_norm(bytes(t), x.numel() / n, n, quantization(x_scale, x_zero_point, x.scalar_type()),
             affine_of(weight, bias, n), eps, output, bytes(y));
  return y;
}

Tensor softmax_op(const Tensor x, double x_scale, int64_t dim, double scale, int64_t zero_point) {
  const Quantization output = quantization(scale, zero_point, x.scalar_type());
  const Tensor t = densified(x);
  Tensor y = empty_like(t, t.scalar_type());
  if (x.numel() == 0) return y;
  const Dense d = x.dim() == 0 ? Dense{nullptr, Element::other, 1, 1, 1} : dense(view(t), dim);
  check(x_scale > 0 && x_scale < INFINITY, "x_scale must be positive and finite, got ", x_scale);
  softmax(bytes(t), d.outer, d.channels, d.inner, x_scale, output.is_signed, output, bytes(y));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("quantized_batch_norm", TORCH_BOX(&batch_norm_op));
  m.impl("quantized_group_norm", TORCH_BOX(&group_norm_op));
  m.impl("quantized_layer_norm", TORCH_BOX(&layer_norm_op));
  m.impl("quantized_softmax", TORCH_BOX(&softmax_op));
}

}  // namespace fastquant
