// Registers the CUDA implementations of the ops in library.cpp. They check tensors, allocate outputs, and
// launch kernels on torch's current stream of x's device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../fused_arguments.h"
#include "kernels.h"
#include "stream.h"
#include "workspace.h"

namespace fastquant::cuda {
namespace {

int64_t mask_bytes(int64_t numel) { return (numel + 63) / 64 * 8; }

// One call of an op. Makes x's device the current one, and checks that all other tensors are on it.
class Call {
 public:
  explicit Call(const Tensor& x) : device_(x), workspace_(x, device_.index(), device_.stream()), x_(x) {}

  Launcher& launcher() { return workspace_; }

  // A contiguous tensor of any dtype.
  Array memory(const Tensor& t, const char* name) const {
    check_device(t, name);
    check(t.is_contiguous(), name, " must be contiguous");
    return {t.mutable_data_ptr(), element(t.scalar_type()), t.numel(), name};
  }

  // A contiguous tensor of a dtype that kernels can read.
  Array array(const Tensor& t, const char* name) const {
    const Array a = memory(t, name);
    check(a.type != Element::other, name, " must be floating, int32 or int64");
    return a;
  }

  Array single(const Tensor& t, const char* name) const {
    const Array a = array(t, name);
    check_count(a, 1);
    return a;
  }

  // An int64 tensor of one element, in which elements are counted.
  Array counter(const Tensor& t, const char* name) const {
    const Array a = single(t, name);
    check(a.type == Element::i64, name, " must be int64");
    return a;
  }

  // A tensor of one element, of bool or any integer dtype.
  Flag flag(const Tensor& t) const {
    check_device(t, "a flag");
    const size_t bytes = t.element_size();
    check(t.numel() == 1 && bytes <= 8, "a flag must be one integer");
    return {t.const_data_ptr(), static_cast<int>(bytes)};
  }

  Flag flag(const std::optional<Tensor>& t) const { return t.has_value() ? flag(*t) : Flag(); }

  ObserveBuffers observed(const Tensor& min_val, const Tensor& max_val, const Tensor& nonfinite_count) const {
    return {array(min_val, "min_val"), array(max_val, "max_val"), counter(nonfinite_count, "nonfinite_count")};
  }

  QParamBuffers qparams(const Tensor& scale, const Tensor& zero_point, const Tensor& eps) const {
    return {array(scale, "scale"), array(zero_point, "zero_point"), single(eps, "eps")};
  }

 private:
  void check_device(const Tensor& t, const char* name) const {
    int32_t type, x_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x_.get(), &x_type));
    check(type == x_type && t.get_device_index() == x_.get_device_index(), name, " must be on x's device");
  }

  OnDevice device_;
  Workspace workspace_;
  const Tensor& x_;
};

// ---------------------------------------------------------------------------- observe

void observe_minmax_(const Tensor x, Tensor min_val, Tensor max_val, Tensor nonfinite_count,
                     std::optional<int64_t> ch_axis, std::optional<double> averaging_constant,
                     int64_t nonfinite) {
  Call call(x);
  const Tensor t = densified(x);
  observe_minmax(call.launcher(), dense(view(t), ch_axis), call.observed(min_val, max_val, nonfinite_count),
                 averaging_constant, static_cast<NonFinite>(nonfinite));
}

void observe_histogram_(const Tensor x, Tensor histogram, Tensor min_val, Tensor max_val,
                        Tensor nonfinite_count, int64_t upsample_rate, int64_t nonfinite, int64_t times) {
  Call call(x);
  const Tensor t = densified(x);
  observe_histogram(call.launcher(), dense(view(t), std::nullopt), call.array(histogram, "histogram"),
                    call.observed(min_val, max_val, nonfinite_count), upsample_rate,
                    static_cast<NonFinite>(nonfinite), times);
}

void observe_qparams_(const FusedArguments& a) {
  Call call(a.x);
  const Tensor t = densified(a.x);
  observe_qparams(call.launcher(), dense(view(t), a.settings.ch_axis), call.flag(a.observer_enabled),
                  call.observed(a.min_val, a.max_val, a.nonfinite_count),
                  call.qparams(a.scale, a.zero_point, a.eps), a.settings.averaging_constant, a.settings.qparams,
                  a.settings.nonfinite);
}

// ----------------------------------------------------------------- quantization params

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor min_val, const Tensor max_val, const Tensor eps,
                                             int64_t quant_min, int64_t quant_max, int64_t scheme,
                                             int64_t symmetric_zero_point) {
  Call call(min_val);
  const QParamsConfig config = {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point};
  Tensor scale = empty_1d(min_val.numel(), min_val.scalar_type(), min_val);
  const ScalarType type = config.scheme == Scheme::affine      ? ScalarType::Int
                          : config.scheme == Scheme::symmetric ? ScalarType::Long
                                                               : min_val.scalar_type();
  Tensor zero_point = empty_1d(min_val.numel(), type, min_val);
  choose_qparams(call.launcher(), call.array(min_val, "min_val"), call.array(max_val, "max_val"),
                 call.qparams(scale, zero_point, eps), config);
  return {scale, zero_point};
}

std::tuple<Tensor, Tensor> search_histogram_range_op(const Tensor histogram, const Tensor min_val,
                                                     const Tensor max_val, int64_t dst_nbins) {
  Call call(histogram);
  Tensor new_min = empty_as(min_val), new_max = empty_as(max_val);
  search_histogram_range(call.launcher(), call.array(histogram, "histogram"), call.array(min_val, "min_val"),
                         call.array(max_val, "max_val"), dst_nbins, call.array(new_min, "new_min"),
                         call.array(new_max, "new_max"));
  return {new_min, new_max};
}

// ---------------------------------------------------------------------- fake-quantize

Tensor empty_mask(const Tensor& x) { return empty_1d(mask_bytes(x.numel()), ScalarType::Byte, x); }

uint64_t* words(Tensor& mask) { return static_cast<uint64_t*>(mask.mutable_data_ptr()); }

Tensor quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                const std::optional<Tensor>& enabled, std::optional<int64_t> ch_axis, int64_t quant_min,
                int64_t quant_max, Tensor* mask) {
  Call call(x);
  const Tensor t = densified(x);
  Tensor y = empty_as(t);
  fake_quantize(call.launcher(), dense(view(t), ch_axis), call.flag(enabled), call.array(scale, "scale"),
                call.array(zero_point, "zero_point"), {quant_min, quant_max}, y.mutable_data_ptr(),
                mask == nullptr ? nullptr : words(*mask));
  return y;
}

Tensor fake_quantize_op(const Tensor x, const Tensor scale, const Tensor zero_point,
                        const std::optional<Tensor> enabled, std::optional<int64_t> ch_axis, int64_t quant_min,
                        int64_t quant_max) {
  return quantize(x, scale, zero_point, enabled, ch_axis, quant_min, quant_max, nullptr);
}

std::tuple<Tensor, Tensor> fake_quantize_with_mask(const Tensor x, const Tensor scale, const Tensor zero_point,
                                                   const std::optional<Tensor> enabled,
                                                   std::optional<int64_t> ch_axis, int64_t quant_min,
                                                   int64_t quant_max) {
  Tensor mask = empty_mask(x);
  Tensor y = quantize(x, scale, zero_point, enabled, ch_axis, quant_min, quant_max, &mask);
  return {y, mask};
}

Tensor fake_quantize_backward(const Tensor grad, const Tensor mask) {
  Call call(grad);
  check(is_dense(view(grad)), "grad must have the layout of the output");
  const Tensor whole = mask_words_of(mask);
  const Array packed = call.memory(whole, "mask");
  check_count(packed, mask_bytes(grad.numel()));
  Tensor out = empty_as(grad);
  mask_gradient(call.launcher(), dense(view(grad), std::nullopt), static_cast<const uint64_t*>(packed.data),
                out.mutable_data_ptr());
  return out;
}

Tensor quantize_per_channel_op(const Tensor x, const Tensor scale, int64_t ch_axis, int64_t quant_min,
                               int64_t quant_max) {
  Call call(x);
  const Tensor t = densified(x);
  Tensor out = empty_as(t, ScalarType::Char);
  quantize_per_channel(call.launcher(), dense(view(t), ch_axis), call.array(scale, "scale"),
                       {quant_min, quant_max}, static_cast<int8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor observe_and_quantize(const FusedArguments& a, Tensor* mask) {
  Call call(a.x);
  const Tensor t = densified(a.x);
  Tensor y = empty_as(t);
  observe_and_fake_quantize(
      call.launcher(), dense(view(t), a.settings.ch_axis), call.flag(a.observer_enabled),
      call.flag(a.fake_quant_enabled), call.observed(a.min_val, a.max_val, a.nonfinite_count),
      call.qparams(a.scale, a.zero_point, a.eps), a.settings.averaging_constant, a.settings.qparams,
      a.settings.nonfinite, y.mutable_data_ptr(), mask == nullptr ? nullptr : words(*mask));
  return y;
}

Tensor fused_observe_fake_quantize(const FusedArguments& a) { return observe_and_quantize(a, nullptr); }

std::tuple<Tensor, Tensor> fused_observe_fake_quantize_with_mask(const FusedArguments& a) {
  Tensor mask = empty_mask(a.x);
  Tensor y = observe_and_quantize(a, &mask);
  return {y, mask};
}

// ------------------------------------------------------------------- batch norm as one

// t itself, or a copy, so that it has x's dtype and lies in memory as x does.
Tensor laid_out_as(const Tensor& t, const Tensor& x) {
  if (has_layout_of(t, x)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

Dense dense_channels(const Tensor& x) {
  check(x.dim() >= 2 && x.dim() <= 5, "x must have 2 to 5 dimensions, got ", x.dim());
  return dense(view(x), 1);
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> observe_batch_norm_(
    const Tensor x, const Tensor weight, const Tensor bias, Tensor running_mean, Tensor running_var,
    bool training, double momentum, double bn_eps, double low, double high, const Tensor observer_enabled,
    const Tensor fake_quant_enabled, Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point,
    Tensor nonfinite_count, const Tensor eps, std::optional<double> averaging_constant, int64_t quant_min,
    int64_t quant_max, int64_t scheme, int64_t symmetric_zero_point, int64_t nonfinite) {
  Call call(x);
  const Tensor t = densified(x);
  const Dense d = dense_channels(t);
  check(!training || x.numel() != d.channels, "batch statistics need more than one value per channel");
  const int64_t norm_sizes[] = {4, d.channels}, norm_strides[] = {d.channels, 1};
  Tensor norm = empty_strided(2, norm_sizes, norm_strides, compute_type(x), x);
  Tensor quantizer = empty_1d(3, ScalarType::Double, x);
  const QParamBuffers qparams = call.qparams(scale, zero_point, eps);
  check(qparams.zero_point.type == Element::i32 || qparams.zero_point.type == Element::i64,
        "zero_point must have an integer dtype");
  observe_batch_norm(call.launcher(), d,
                     {call.array(weight, "weight"), call.array(bias, "bias"),
                      call.array(running_mean, "running_mean"), call.array(running_var, "running_var")},
                     {training, momentum, bn_eps, low, high}, call.flag(observer_enabled),
                     call.flag(fake_quant_enabled), call.observed(min_val, max_val, nonfinite_count), qparams,
                     averaging_constant,
                     {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point},
                     static_cast<NonFinite>(nonfinite), norm.mutable_data_ptr(),
                     static_cast<double*>(quantizer.mutable_data_ptr()));
  return {norm, quantizer};
}

Tensor batch_norm_fake_quantize_op(const Tensor x, const Tensor, const Tensor, const Tensor norm,
                                   const Tensor quantizer, bool training, double low, double high,
                                   int64_t quant_min, int64_t quant_max) {
  Call call(x);
  const Tensor t = densified(x);
  Tensor y = empty_as(t);
  batch_norm_fake_quantize(call.launcher(), dense_channels(t), call.array(norm, "norm"),
                           call.array(quantizer, "quantizer"), {training, low, high, {quant_min, quant_max}},
                           y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fake_quantize_backward(const Tensor grad, const Tensor x,
                                                                     const Tensor norm, const Tensor quantizer,
                                                                     bool training, double low, double high,
                                                                     int64_t quant_min, int64_t quant_max) {
  Call call(x);
  const Tensor t = densified(x), whole_grad = laid_out_as(grad, t);
  const Dense d = dense_channels(t);
  Tensor grad_x = empty_as(t);
  Tensor grad_weight = empty_1d(d.channels, compute_type(x), x), grad_bias = empty_as(grad_weight);
  batch_norm_backward(call.launcher(), d, whole_grad.const_data_ptr(), call.array(norm, "norm"),
                      call.array(quantizer, "quantizer"), {training, low, high, {quant_min, quant_max}},
                      grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr());
  return {grad_x, grad_weight, grad_bias};
}

// ------------------------------------------------------------ learnable scale and zero point

Tensor learnable_fake_quantize_op(const Tensor x, const Tensor scale, const Tensor zero_point,
                                  std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                                  double) {
  Call call(x);
  const Tensor t = densified(x);
  Tensor y = empty_as(t);
  learnable_fake_quantize(call.launcher(), dense(view(t), ch_axis), call.array(scale, "scale"),
                          call.array(zero_point, "zero_point"), {quant_min, quant_max}, y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> learnable_fake_quantize_backward(const Tensor grad, const Tensor x,
                                                                    const Tensor scale, const Tensor zero_point,
                                                                    std::optional<int64_t> ch_axis,
                                                                    int64_t quant_min, int64_t quant_max,
                                                                    double grad_factor) {
  Call call(x);
  const Tensor t = densified(x);
  const Tensor aligned = laid_out_as(grad, t);
  Tensor grad_x = empty_as(t), grad_scale = empty_as(scale), grad_zero_point = empty_as(zero_point);
  learnable_backward(call.launcher(), dense(view(t), ch_axis), aligned.const_data_ptr(),
                     call.array(scale, "scale"), call.array(zero_point, "zero_point"), {quant_min, quant_max},
                     grad_factor, grad_x.mutable_data_ptr(), call.array(grad_scale, "grad_scale"),
                     call.array(grad_zero_point, "grad_zero_point"));
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace
}  // namespace fastquant::cuda

STABLE_TORCH_LIBRARY_IMPL(fastquant, CUDA, m) {
  using namespace fastquant::cuda;
  using fastquant::fused_op;
  using fastquant::observe_op;
  m.impl("observe_minmax_", TORCH_BOX(&observe_minmax_));
  m.impl("observe_histogram_", TORCH_BOX(&observe_histogram_));
  m.impl("observe_qparams_", TORCH_BOX(&observe_op<&observe_qparams_>));
  m.impl("search_histogram_range", TORCH_BOX(&search_histogram_range_op));
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams_op));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_op));
  m.impl("fake_quantize_with_mask", TORCH_BOX(&fake_quantize_with_mask));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel_op));
  m.impl("fused_observe_fake_quantize", TORCH_BOX(&fused_op<&fused_observe_fake_quantize>));
  m.impl("fused_observe_fake_quantize_with_mask", TORCH_BOX(&fused_op<&fused_observe_fake_quantize_with_mask>));
  m.impl("observe_batch_norm_", TORCH_BOX(&observe_batch_norm_));
  m.impl("batch_norm_fake_quantize", TORCH_BOX(&batch_norm_fake_quantize_op));
  m.impl("batch_norm_fake_quantize_backward", TORCH_BOX(&batch_norm_fake_quantize_backward));
  m.impl("learnable_fake_quantize", TORCH_BOX(&learnable_fake_quantize_op));
  m.impl("learnable_fake_quantize_backward", TORCH_BOX(&learnable_fake_quantize_backward));
}
