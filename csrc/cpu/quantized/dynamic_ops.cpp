// Registers the CPU implementations of the ops of layers that quantize their input at each call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../half_linear.h"
#include "dynamic.h"
#include "layer_tensors.h"
#include "recurrent.h"
#include "transposed.h"

namespace fastquant {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

Tensor converted(const Tensor& x, ScalarType dtype) {
  Tensor y = empty_as(x, dtype);
  torch::stable::copy_(y, x);
  return y;
}

// x, in fp32 where kernels cannot read its dtype.
Tensor readable(const Tensor& x) {
  check(x.is_cpu(), "x must be on the CPU");
  return x.scalar_type() == ScalarType::Double ? converted(x, ScalarType::Float) : x;
}

// Calls f(memory, type) to fill a new tensor of x's dtype, in fp32 first where kernels cannot write it.
template <class F>
Tensor floating_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, const Tensor& x,
                       const F& f) {
  const ScalarType dtype = x.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  const ScalarType written = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor y = empty_strided(dims, sizes, strides, written, x);
  f(y.mutable_data_ptr(), is_bf16 ? OutputType::bf16 : OutputType::f32);
  return dtype == written ? y : converted(y, dtype);
}

// ----------------------------------------------------------------------------- linear

// The output of a linear layer: contiguous, with the sizes of x but for the last.
struct LinearOutput {
  LinearOutput(const Tensor& x, int64_t out_features) : rows(1) {
    check(x.dim() <= kMaxDims, "x has ", x.dim(), " dimensions");
    const int64_t last = x.dim() - 1;
    for (int64_t d = last, stride = 1; d >= 0; --d) {
      sizes[d] = d == last ? out_features : x.sizes()[d];
      strides[d] = stride;
      stride *= std::max<int64_t>(sizes[d], 1);
      if (d != last) rows *= sizes[d];
    }
  }

  int64_t sizes[kMaxDims], strides[kMaxDims], rows;
};

Tensor dynamic_linear_op(const Tensor x, const Tensor packed_weight, const Tensor weight_scale,
                         const std::optional<Tensor> bias, int64_t out_features, bool relu, bool reduce_range) {
  check(x.dim() >= 1, "x has no dimensions");
  const Tensor input = torch::stable::contiguous(readable(x));
  const int64_t in_features = x.sizes()[x.dim() - 1];
  const int64_t shape[] = {out_features, in_features};
  const PackedLayout layout(shape, 2, 1, false);
  const uint8_t* const packed = packed_data(packed_weight, layout);
  const LayerScales scales = scales_of(weight_scale, bias, out_features);
  const LinearOutput output(x, out_features);
  return floating_tensor(x.dim(), output.sizes, output.strides, x, [&](void* y, OutputType type) {
    dynamic_linear(input.const_data_ptr(), element(input.scalar_type()), output.rows, in_features, out_features,
                   packed, scales, relu, reduce_range, y, type);
  });
}

Tensor half_linear_op(const Tensor x, const Tensor packed_weight, const std::optional<Tensor> bias,
                      int64_t out_features, bool relu) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() >= 1,
        "x must be a float32 tensor on the CPU");
  const int64_t inputs = x.sizes()[x.dim() - 1];
  check(out_features >= 0 && packed_weight.is_cpu() && packed_weight.scalar_type() == ScalarType::Half &&
            packed_weight.is_contiguous() && packed_weight.dim() == 3 &&
            packed_weight.sizes()[0] == rounded_up(out_features, kHalfPanel) / kHalfPanel &&
            packed_weight.sizes()[1] == inputs && packed_weight.sizes()[2] == kHalfPanel,
        "packed_weight is not the float16 weight of a layer with ", inputs, " inputs and ", out_features,
        " outputs");
  const float* b = nullptr;
  if (bias.has_value()) {
    check(bias->is_cpu() && bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
              bias->numel() == out_features,
          "bias must be a contiguous float32 tensor of ", out_features, " elements on the CPU");
    b = static_cast<const float*>(bias->const_data_ptr());
  }
  const Tensor rows = torch::stable::contiguous(x);
  const LinearOutput output(x, out_features);
  Tensor y = empty_strided(x.dim(), output.sizes, output.strides, ScalarType::Float, x);
  half_linear({static_cast<const float*>(rows.const_data_ptr()),
               static_cast<const Half*>(packed_weight.const_data_ptr()), b, relu,
               static_cast<float*>(y.mutable_data_ptr()), output.rows, inputs, out_features});
  return y;
}

// ------------------------------------------------------------------------ convolution

using Conv = void (*)(const QuantizedValues&, const ConvShape&, const uint8_t*, const LayerScales&,
                      const OutputFormat&);

// The values of x with its channels last.
DynamicInput input_of_conv(const Tensor& x, bool reduce_range) {
  const int64_t images = x.sizes()[0], channels = x.sizes()[1];
  const Element type = element(x.scalar_type());
  if (has_channels_last(x.dim(), x.sizes().data(), x.strides().data())) {
    return {x.const_data_ptr(), type, x.numel(), reduce_range};
  }
  const int64_t pixels = x.numel() / std::max<int64_t>(images * channels, 1);
  return {x.const_data_ptr(), type, images, channels, pixels, reduce_range};
}

Tensor convolved(Conv conv, const Tensor& x, const ConvShape& shape, const uint8_t* packed,
                 const LayerScales& scales, bool reduce_range) {
  int64_t sizes[kMaxLayerDims], strides[kMaxLayerDims];
  conv_output_sizes(shape, x.dim(), sizes);
  channels_last_strides(x.dim(), sizes, strides);
  Tensor input = readable(x);
  if (!has_channels_last(input.dim(), input.sizes().data(), input.strides().data())) {
    input = torch::stable::contiguous(input);
  }
  return floating_tensor(x.dim(), sizes, strides, x, [&](void* y, OutputType type) {
    if (shape.positions() == 0 || shape.out_channels == 0) return;
    const DynamicInput values = input_of_conv(input, reduce_range);
    conv(values.values(), shape, packed, scales, floating_output(y, type, false));
    values.spread_nonfinite(shape.batch, 0, shape.batch, y, type,
                            shape.positions() / shape.batch * shape.out_channels);
  });
}

Tensor dynamic_conv_op(const Tensor x, const Tensor packed_weight, const Tensor weight_scale,
                       const std::optional<Tensor> bias, std::vector<int64_t> weight_shape,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       int64_t groups, bool reduce_range) {
  const ConvShape shape =
      conv_shape(x.dim(), x.sizes().data(), arguments_of(weight_shape, stride, padding, dilation, groups));
  const PackedLayout layout(weight_shape.data(), x.dim(), groups, false);
  return convolved(quantized_conv, x, shape, packed_data(packed_weight, layout),
                   scales_of(weight_scale, bias, shape.out_channels), reduce_range);
}

Tensor dynamic_conv_transpose_op(const Tensor x, const Tensor packed_weight, const Tensor weight_scale,
                                 const std::optional<Tensor> bias, std::vector<int64_t> weight_shape,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> output_padding, std::vector<int64_t> dilation,
                                 int64_t groups, bool reduce_range) {
  const ConvShape shape = conv_transpose_shape(x.dim(), x.sizes().data(),
                                               arguments_of(weight_shape, stride, padding, dilation, groups),
                                               spatial(output_padding));
  const PackedLayout layout(weight_shape.data(), x.dim(), groups, true);
  return convolved(quantized_conv_transpose, x, shape, packed_data(packed_weight, layout),
                   scales_of(weight_scale, bias, shape.out_channels), reduce_range);
}

// -------------------------------------------------------------------------- recurrent

// The weights of one layer in one direction, as arguments of the ops.
struct Weights {
  const Tensor &of_x, &scale_of_x;
  const std::optional<Tensor>& bias_of_x;
  const Tensor &of_h, &scale_of_h;
  const std::optional<Tensor>& bias_of_h;

  RecurrentWeights checked(int64_t gates, int64_t inputs, int64_t hidden) const {
    const int64_t width = gates * hidden, x_shape[] = {width, inputs}, h_shape[] = {width, hidden};
    return {packed_data(of_x, PackedLayout(x_shape, 2, 1, false)),
            packed_data(of_h, PackedLayout(h_shape, 2, 1, false)), scales_of(scale_of_x, bias_of_x, width),
            scales_of(scale_of_h, bias_of_h, width)};
  }
};

Tensor floats(const Tensor& t, const char* name) {
  check(t.is_cpu() && t.scalar_type() == ScalarType::Float, name, " must be a float32 tensor on the CPU");
  return torch::stable::contiguous(t);
}

// What the two ops share: x is [steps, batch, inputs], or [rows of all steps, inputs] with batch_sizes.
struct Recurrent {
  Recurrent(const Tensor& x, const std::optional<Tensor>& batch_sizes, const Tensor& h, bool reverse,
            bool reduce_range)
      : input(floats(x, "x")), state(torch::stable::clone(floats(h, "h"))) {
    check(h.dim() == 2, "h must have the shape [batch, hidden]");
    check(x.dim() == (batch_sizes.has_value() ? 2 : 3), "x has ", x.dim(), " dimensions");
    const auto sizes = x.sizes();
    s = {static_cast<const float*>(input.const_data_ptr()),
         nullptr,
         sizes[0],
         sizes[0],
         h.sizes()[0],
         sizes[x.dim() - 1],
         h.sizes()[1],
         reverse,
         reduce_range};
    if (batch_sizes.has_value()) {
      take_batch_sizes(*batch_sizes);
    } else {
      check(sizes[1] == s.batch, "x has a batch of ", sizes[1], ", h of ", s.batch);
      s.rows = s.steps * s.batch;
    }
    int64_t shape[3], strides[3];
    const int64_t last = x.dim() - 1;
    for (int64_t d = last, stride = 1; d >= 0; --d) {
      shape[d] = d == last ? s.hidden : sizes[d];
      strides[d] = stride;
      stride *= std::max<int64_t>(shape[d], 1);
    }
    y.emplace(empty_strided(x.dim(), shape, strides, ScalarType::Float, x));
  }

  void take_batch_sizes(const Tensor& given) {
    check(given.is_cpu() && given.scalar_type() == ScalarType::Long && given.dim() == 1,
          "batch_sizes must be an int64 vector on the CPU");
    counts.emplace(torch::stable::contiguous(given));
    s.batch_sizes = static_cast<const int64_t*>(counts->const_data_ptr());
    s.steps = counts->numel();
    int64_t rows = 0;
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t n = s.batch_sizes[t];
      check(n > 0 && n <= (t == 0 ? s.batch : s.batch_sizes[t - 1]),
            "batch_sizes must be positive, not increase, and begin with at most the batch of h");
      rows += n;
    }
    check(rows == s.rows, "batch_sizes count ", rows, " rows, x has ", s.rows);
  }

  static float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

  Tensor input, state;
  std::optional<Tensor> counts, y;
  Sequences s;
};

std::tuple<Tensor, Tensor, Tensor> dynamic_lstm_op(const Tensor x, const std::optional<Tensor> batch_sizes,
                                                   const Tensor h, const Tensor c, const Tensor packed_of_x,
                                                   const Tensor scale_of_x,
                                                   const std::optional<Tensor> bias_of_x,
                                                   const Tensor packed_of_h, const Tensor scale_of_h,
                                                   const std::optional<Tensor> bias_of_h, bool reverse,
                                                   bool reduce_range) {
  Recurrent r(x, batch_sizes, h, reverse, reduce_range);
  const Weights weights = {packed_of_x, scale_of_x, bias_of_x, packed_of_h, scale_of_h, bias_of_h};
  check(std::equal(c.sizes().begin(), c.sizes().end(), h.sizes().begin(), h.sizes().end()),
        "c must have the shape of h");
  Tensor cells = torch::stable::clone(floats(c, "c"));
  dynamic_lstm(r.s, weights.checked(4, r.s.inputs, r.s.hidden), Recurrent::data(*r.y), Recurrent::data(r.state),
               Recurrent::data(cells));
  return {*r.y, r.state, cells};
}

std::tuple<Tensor, Tensor> dynamic_gru_op(const Tensor x, const std::optional<Tensor> batch_sizes,
                                          const Tensor h, const Tensor packed_of_x, const Tensor scale_of_x,
                                          const std::optional<Tensor> bias_of_x, const Tensor packed_of_h,
                                          const Tensor scale_of_h, const std::optional<Tensor> bias_of_h,
                                          bool reverse, bool reduce_range) {
  Recurrent r(x, batch_sizes, h, reverse, reduce_range);
  const Weights weights = {packed_of_x, scale_of_x, bias_of_x, packed_of_h, scale_of_h, bias_of_h};
  dynamic_gru(r.s, weights.checked(3, r.s.inputs, r.s.hidden), Recurrent::data(*r.y), Recurrent::data(r.state));
  return {*r.y, r.state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("dynamic_linear", TORCH_BOX(&dynamic_linear_op));
  m.impl("half_linear", TORCH_BOX(&half_linear_op));
  m.impl("dynamic_conv", TORCH_BOX(&dynamic_conv_op));
  m.impl("dynamic_conv_transpose", TORCH_BOX(&dynamic_conv_transpose_op));
  m.impl("dynamic_lstm", TORCH_BOX(&dynamic_lstm_op));
  m.impl("dynamic_gru", TORCH_BOX(&dynamic_gru_op));
}

}  // namespace fastquant
