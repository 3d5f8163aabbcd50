// The schemas of all ops. docs/architecture.md describes what the ops do.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastquant, m) {
  // Observe: these ops update the statistics in place.
  m.def(
      "observe_minmax_(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) nonfinite_count, "
      "int? ch_axis, float? averaging_constant, int nonfinite) -> ()");
  m.def(
      "observe_histogram_(Tensor x, Tensor(a!) histogram, Tensor(b!) min_val, Tensor(c!) max_val, "
      "Tensor(d!) nonfinite_count, int upsample_rate, int nonfinite, int times=1) -> ()");
  m.def(
      "observe_channel_histograms_(Tensor x, Tensor(a!) histogram, Tensor(b!) min_val, Tensor(c!) max_val, "
      "Tensor(d!) nonfinite_count, int ch_axis, int upsample_rate, int nonfinite) -> ()");
  m.def(
      "observe_qparams_(Tensor x, Tensor observer_enabled, Tensor(a!) min_val, Tensor(b!) max_val, "
      "Tensor(c!) scale, Tensor(d!) zero_point, Tensor(e!) nonfinite_count, Tensor eps, int? ch_axis, "
      "float? averaging_constant, int quant_min, int quant_max, int scheme, int symmetric_zero_point, "
      "int nonfinite) -> ()");

  // The error of what quantization made of a tensor, added to sums.
  m.def(
      "observe_error_(Tensor reference, Tensor x, float? scale, int zero_point, int quant_min, int quant_max, "
      "Tensor(a!) sums, Tensor(b!) integers) -> ()");

  // From statistics to quantization parameters.
  m.def(
      "search_histogram_range(Tensor histogram, Tensor min_val, Tensor max_val, int dst_nbins) "
      "-> (Tensor, Tensor)");
  m.def(
      "histogram_range(Tensor histogram, Tensor min_val, Tensor max_val, int method, float percentile, "
      "int search_levels, int quant_min, int quant_max, int scheme, int symmetric_zero_point) "
      "-> (Tensor, Tensor)");
  m.def(
      "least_error_range(Tensor x, int? ch_axis, int quant_min, int quant_max, int scheme, "
      "int symmetric_zero_point) -> (Tensor, Tensor)");
  m.def(
      "histogram_error(Tensor histogram, Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point, "
      "int quant_min, int quant_max) -> Tensor");
  m.def(
      "choose_qparams(Tensor min_val, Tensor max_val, Tensor eps, int quant_min, int quant_max, int scheme, "
      "int symmetric_zero_point) -> (Tensor, Tensor)");

  // Fake-quantize.
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor? enabled, int? ch_axis, int quant_min, "
      "int quant_max) -> Tensor");
  m.def(
      "fake_quantize_with_mask(Tensor x, Tensor scale, Tensor zero_point, Tensor? enabled, int? ch_axis, "
      "int quant_min, int quant_max) -> (Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor");

  // Observe and fake-quantize in one call.
  m.def(
      "fused_observe_fake_quantize(Tensor x, Tensor observer_enabled, Tensor fake_quant_enabled, "
      "Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!) zero_point, "
      "Tensor(e!) nonfinite_count, Tensor eps, int? ch_axis, float? averaging_constant, int quant_min, "
      "int quant_max, int scheme, int symmetric_zero_point, int nonfinite) -> Tensor");
  m.def(
      "fused_observe_fake_quantize_with_mask(Tensor x, Tensor observer_enabled, Tensor fake_quant_enabled, "
      "Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, Tensor(d!) zero_point, "
      "Tensor(e!) nonfinite_count, Tensor eps, int? ch_axis, float? averaging_constant, int quant_min, "
      "int quant_max, int scheme, int symmetric_zero_point, int nonfinite) -> (Tensor, Tensor)");

  // Batch norm, an activation that clamps to [low, high], observe and fake-quantize per tensor.
  m.def(
      "observe_batch_norm_(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, bool training, float momentum, float bn_eps, float low, float high, "
      "Tensor observer_enabled, Tensor fake_quant_enabled, Tensor(c!) min_val, Tensor(d!) max_val, "
      "Tensor(e!) scale, Tensor(f!) zero_point, Tensor(g!) nonfinite_count, Tensor eps, "
      "float? averaging_constant, int quant_min, int quant_max, int scheme, int symmetric_zero_point, "
      "int nonfinite) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_fake_quantize(Tensor x, Tensor weight, Tensor bias, Tensor norm, Tensor quantizer, "
      "bool training, float low, float high, int quant_min, int quant_max) -> Tensor");
  m.def(
      "batch_norm_fake_quantize_backward(Tensor grad, Tensor x, Tensor norm, Tensor quantizer, bool training, "
      "float low, float high, int quant_min, int quant_max) -> (Tensor, Tensor, Tensor)");

  // The sum of two tensors, clamped to [low, high], observed and fake-quantized per tensor.
  m.def(
      "add_observe_fake_quantize(Tensor a, Tensor b, float low, float high, Tensor observer_enabled, "
      "Tensor fake_quant_enabled, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor(e!) nonfinite_count, Tensor eps, float? averaging_constant, "
      "int quant_min, int quant_max, int scheme, int symmetric_zero_point, int nonfinite) -> (Tensor, Tensor)");

  // Weights of a layer that is followed by batch norm: quantized as scaled by it, then unscaled.
  m.def(
      "observe_folded_weight_(Tensor weight, Tensor bn_weight, Tensor bn_std, "
      "Tensor observer_enabled, Tensor fake_quant_enabled, Tensor(a!) min_val, Tensor(b!) max_val, "
      "Tensor(c!) scale, Tensor(d!) zero_point, Tensor(e!) nonfinite_count, Tensor eps, int? ch_axis, "
      "float? averaging_constant, int quant_min, int quant_max, int scheme, int symmetric_zero_point, "
      "int nonfinite) -> (Tensor, Tensor)");
  m.def("fold_weight(Tensor weight, Tensor fold, int quant_min, int quant_max) -> Tensor");
  m.def(
      "fold_weight_backward(Tensor grad, Tensor weight, Tensor fold, int quant_min, int quant_max) "
      "-> (Tensor, Tensor)");

  // A convolution with a kernel of one element, a depthwise one, or one of 3x3 taps, which are padded by half
  // their kernel. The two flags say which gradients are needed; the others are empty.
  m.def("convolution(Tensor x, Tensor weight, Tensor? bias, int stride) -> Tensor");
  m.def(
      "convolution_backward(Tensor grad, Tensor x, Tensor weight, int stride, bool of_x, bool of_weight) "
      "-> (Tensor, Tensor)");

  // Quantize weights to int8 with zero points of 0.
  m.def("quantize_per_channel(Tensor x, Tensor scale, int ch_axis, int quant_min, int quant_max) -> Tensor");

  // Learnable scale and zero point (LSQ).
  m.def(
      "learnable_fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int? ch_axis, int quant_min, "
      "int quant_max, float grad_factor) -> Tensor");
  m.def(
      "learnable_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? ch_axis, "
      "int quant_min, int quant_max, float grad_factor) -> (Tensor, Tensor, Tensor)");

  // Layers on quantized tensors: uint8 or int8 with a scale and a zero point of each tensor. low and high bound
  // the output in real units.
  m.def("quantize(Tensor x, float scale, int zero_point, ScalarType dtype, bool channels_last) -> Tensor");
  m.def("dequantize(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor");
  m.def("pack_weight(Tensor weight, int groups, bool transposed) -> Tensor");
  m.def("unpack_weight(Tensor packed, int[] shape, int groups, bool transposed) -> Tensor");
  m.def(
      "quantized_linear(Tensor x, float x_scale, int x_zero_point, Tensor packed_weight, Tensor weight_scale, "
      "Tensor? bias, int out_features, float scale, int zero_point, float low, float high, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "quantized_conv(Tensor x, float x_scale, int x_zero_point, Tensor packed_weight, Tensor weight_scale, "
      "Tensor? bias, int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, float scale, "
      "int zero_point, float low, float high, ScalarType dtype) -> Tensor");
  m.def(
      "quantized_conv_transpose(Tensor x, float x_scale, int x_zero_point, Tensor packed_weight, "
      "Tensor weight_scale, Tensor? bias, int[] weight_shape, int[] stride, int[] padding, "
      "int[] output_padding, int[] dilation, int groups, float scale, int zero_point, float low, float high, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "quantized_add(Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
      "float scale, int zero_point, float low, float high) -> Tensor");
  m.def(
      "quantized_mul(Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
      "float scale, int zero_point, float low, float high) -> Tensor");
  m.def(
      "quantized_cat(Tensor[] tensors, float[] scales, int[] zero_points, int dim, float scale, "
      "int zero_point, float low, float high) -> Tensor");
  m.def("lookup(Tensor x, Tensor table) -> Tensor");
  m.def(
      "quantized_max_pool(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode) -> Tensor");
  m.def(
      "quantized_avg_pool(Tensor x, int x_zero_point, int[] kernel_size, int[] stride, int[] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
  m.def("quantized_adaptive_avg_pool(Tensor x, int[] output_size) -> Tensor");
  m.def("quantized_mean(Tensor x, int[] dim, bool keepdim) -> Tensor");
  m.def(
      "quantized_interpolate(Tensor x, int[] output_size, float[] ratios, int mode, bool align_corners) "
      "-> Tensor");
  m.def(
      "quantized_batch_norm(Tensor x, float x_scale, int x_zero_point, Tensor? weight, Tensor? bias, "
      "Tensor running_mean, Tensor running_var, float eps, float scale, int zero_point, float low, "
      "float high) -> Tensor");
  m.def(
      "quantized_group_norm(Tensor x, float x_scale, int x_zero_point, int groups, Tensor? weight, "
      "Tensor? bias, float eps, float scale, int zero_point) -> Tensor");
  m.def(
      "quantized_layer_norm(Tensor x, float x_scale, int x_zero_point, int[] normalized_shape, "
      "Tensor? weight, Tensor? bias, float eps, float scale, int zero_point) -> Tensor");
  m.def("quantized_embedding(Tensor packed, int dim, int bits, Tensor indices) -> Tensor");
  m.def(
      "quantized_embedding_bag(Tensor packed, int dim, int bits, Tensor indices, Tensor? offsets, "
      "Tensor? per_sample_weights, Tensor? mapping, int mode, bool include_last_offset, int? padding_idx) "
      "-> Tensor");
  m.def("quantized_softmax(Tensor x, float x_scale, int dim, float scale, int zero_point) -> Tensor");

  // Layers on floating-point tensors, which they quantize to uint8 at each call.
  m.def(
      "dynamic_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias, int out_features, "
      "bool relu, bool reduce_range) -> Tensor");
  m.def("half_linear(Tensor x, Tensor packed_weight, Tensor? bias, int out_features, bool relu) -> Tensor");
  m.def(
      "dynamic_conv(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias, int[] weight_shape, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool reduce_range) -> Tensor");
  m.def(
      "dynamic_conv_transpose(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias, "
      "int[] weight_shape, int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, "
      "bool reduce_range) -> Tensor");
  m.def(
      "dynamic_lstm(Tensor x, Tensor? batch_sizes, Tensor h, Tensor c, Tensor packed_of_x, Tensor scale_of_x, "
      "Tensor? bias_of_x, Tensor packed_of_h, Tensor scale_of_h, Tensor? bias_of_h, bool reverse, "
      "bool reduce_range) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dynamic_gru(Tensor x, Tensor? batch_sizes, Tensor h, Tensor packed_of_x, Tensor scale_of_x, "
      "Tensor? bias_of_x, Tensor packed_of_h, Tensor scale_of_h, Tensor? bias_of_h, bool reverse, "
      "bool reduce_range) -> (Tensor, Tensor)");
}
