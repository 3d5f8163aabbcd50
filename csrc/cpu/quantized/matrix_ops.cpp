// Registers the CPU implementations of the ops of linear layers and convolutions on quantized tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "layer_tensors.h"
#include "transposed.h"

namespace fastquant {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

Tensor pack_weight_op(const Tensor weight, int64_t groups, bool transposed) {
  check(weight.scalar_type() == ScalarType::Char, "weight must be int8");
  const Tensor w = torch::stable::contiguous(weight);
  const PackedLayout layout(w.sizes().data(), w.dim(), groups, transposed);
  Tensor packed = empty_1d(layout.bytes(), ScalarType::Byte, weight);
  pack_weight(static_cast<const int8_t*>(w.const_data_ptr()), layout,
              static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_weight_op(const Tensor packed, std::vector<int64_t> shape, int64_t groups, bool transposed) {
  const int64_t dims = static_cast<int64_t>(shape.size());
  const PackedLayout layout(shape.data(), dims, groups, transposed);
  std::vector<int64_t> strides(shape.size(), 1);
  for (int64_t d = dims - 2; d >= 0; --d) strides[d] = strides[d + 1] * shape[d + 1];
  Tensor weight = empty_strided(dims, shape.data(), strides.data(), ScalarType::Char, packed);
  unpack_weight(packed_data(packed, layout), layout, static_cast<int8_t*>(weight.mutable_data_ptr()));
  return weight;
}

QuantizedValues values_of(const Tensor& x, double scale, int64_t zero_point) {
  const bool is_signed = x.scalar_type() == ScalarType::Char;
  check(is_signed || x.scalar_type() == ScalarType::Byte, "x must be uint8 or int8");
  check(x.is_cpu(), "x must be on the CPU");
  return {static_cast<const uint8_t*>(x.const_data_ptr()), scale, zero_point, is_signed};
}

OutputFormat format_of(ScalarType dtype, double scale, int64_t zero_point, double low, double high) {
  OutputType type = OutputType::u8;
  switch (dtype) {
    case ScalarType::Byte:
      break;
    case ScalarType::Char:
      type = OutputType::s8;
      break;
    case ScalarType::Float:
      type = OutputType::f32;
      break;
    case ScalarType::BFloat16:
      type = OutputType::bf16;
      break;
    default:
      check(false, "dtype must be uint8, int8, float32 or bfloat16");
  }
  return {nullptr, type, scale, zero_point, low, high};
}

// ----------------------------------------------------------------------------- linear

Tensor quantized_linear_op(const Tensor x, double x_scale, int64_t x_zero_point, const Tensor packed_weight,
                           const Tensor weight_scale, const std::optional<Tensor> bias, int64_t out_features,
                           double scale, int64_t zero_point, double low, double high, ScalarType dtype) {
  check(x.dim() >= 1, "x needs a dimension");
  const Tensor rows = torch::stable::contiguous(x);
  const int64_t in_features = x.sizes()[x.dim() - 1];
  const int64_t shape[] = {out_features, in_features};
  const PackedLayout layout(shape, 2, 1, false);
  const uint8_t* const packed = packed_data(packed_weight, layout);
  OutputFormat format = format_of(dtype, scale, zero_point, low, high);
  int64_t sizes[kMaxDims], strides[kMaxDims];
  check(x.dim() <= kMaxDims, "x has too many dimensions");
  const int64_t last = x.dim() - 1;
  int64_t count = 1;
  for (int64_t d = last, stride = 1; d >= 0; --d) {
    sizes[d] = d == last ? out_features : x.sizes()[d];
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
    if (d != last) count *= sizes[d];
  }
  Tensor out = empty_strided(x.dim(), sizes, strides, dtype, x);
  format.data = out.mutable_data_ptr();
  quantized_linear(values_of(rows, x_scale, x_zero_point), count, in_features, out_features, packed,
                   scales_of(weight_scale, bias, out_features), format);
  return out;
}

// ------------------------------------------------------------------------ convolution

// x itself where its channels are last, else a copy that has them there.
Tensor with_channels_last(const Tensor& x) {
  const auto sizes = x.sizes();
  if (has_channels_last(x.dim(), sizes.data(), x.strides().data())) return x;
  int64_t strides[kMaxLayerDims];
  channels_last_strides(x.dim(), sizes.data(), strides);
  Tensor copy = empty_strided(x.dim(), sizes.data(), strides, x.scalar_type(), x);
  torch::stable::copy_(copy, x);
  return copy;
}

using Conv = void (*)(const QuantizedValues&, const ConvShape&, const uint8_t*, const LayerScales&,
                      const OutputFormat&);

Tensor convolved(Conv conv, const Tensor& x, double x_scale, int64_t x_zero_point, const ConvShape& shape,
                 const uint8_t* packed, const LayerScales& scales, OutputFormat format, ScalarType dtype) {
  int64_t sizes[kMaxLayerDims], strides[kMaxLayerDims];
  conv_output_sizes(shape, x.dim(), sizes);
  channels_last_strides(x.dim(), sizes, strides);
  const Tensor input = with_channels_last(x);
  Tensor out = empty_strided(x.dim(), sizes, strides, dtype, x);
  format.data = out.mutable_data_ptr();
  conv(values_of(input, x_scale, x_zero_point), shape, packed, scales, format);
  return out;
}

Tensor quantized_conv_op(const Tensor x, double x_scale, int64_t x_zero_point, const Tensor packed_weight,
                         const Tensor weight_scale, const std::optional<Tensor> bias,
                         std::vector<int64_t> weight_shape, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                         double scale, int64_t zero_point, double low, double high, ScalarType dtype) {
  const ConvShape shape =
      conv_shape(x.dim(), x.sizes().data(), arguments_of(weight_shape, stride, padding, dilation, groups));
  const PackedLayout layout(weight_shape.data(), x.dim(), groups, false);
  return convolved(quantized_conv, x, x_scale, x_zero_point, shape, packed_data(packed_weight, layout),
                   scales_of(weight_scale, bias, shape.out_channels),
                   format_of(dtype, scale, zero_point, low, high), dtype);
}

Tensor quantized_conv_transpose_op(const Tensor x, double x_scale, int64_t x_zero_point,
                                   const Tensor packed_weight, const Tensor weight_scale,
                                   const std::optional<Tensor> bias, std::vector<int64_t> weight_shape,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> output_padding, std::vector<int64_t> dilation,
                                   int64_t groups, double scale, int64_t zero_point, double low, double high,
                                   ScalarType dtype) {
  const ConvShape shape = conv_transpose_shape(x.dim(), x.sizes().data(),
                                               arguments_of(weight_shape, stride, padding, dilation, groups),
                                               spatial(output_padding));
  const PackedLayout layout(weight_shape.data(), x.dim(), groups, true);
  return convolved(quantized_conv_transpose, x, x_scale, x_zero_point, shape,
                   packed_data(packed_weight, layout), scales_of(weight_scale, bias, shape.out_channels),
                   format_of(dtype, scale, zero_point, low, high), dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight_op));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_op));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear_op));
  m.impl("quantized_conv", TORCH_BOX(&quantized_conv_op));
  m.impl("quantized_conv_transpose", TORCH_BOX(&quantized_conv_transpose_op));
}

}  // namespace fastquant
