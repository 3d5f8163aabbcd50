// Registers the CUDA implementations of the ops in library.cpp. They check tensors, allocate outputs, and
// launch kernels on torch's current stream of x's device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../fused_arguments.h"
#include "../math/folded_weight.h"
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

  // The tensor itself.
  const Tensor& on_device(const Tensor& t, const char* name) const {
    check_device(t, name);
    return t;
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

  // The same where zero points are integers.
  QParamBuffers integer_qparams(const Tensor& scale, const Tensor& zero_point, const Tensor& eps) const {
    const QParamBuffers buffers = qparams(scale, zero_point, eps);
    check(buffers.zero_point.type == Element::i32 || buffers.zero_point.type == Element::i64,
          "zero_point must have an integer dtype");
    return buffers;
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

bool has_shape_of(const Tensor& t, const Tensor& x) {
  const auto sizes = t.sizes(), others = x.sizes();
  return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

// t itself, or a copy, so that it has x's dtype and lies in memory as x does.
Tensor laid_out_as(const Tensor& t, const Tensor& x) {
  check(has_shape_of(t, x), "tensors of different shapes");
  if (has_layout_of(t, x)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

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

std::tuple<Tensor, Tensor> add_observe_fake_quantize(const FusedArguments& of, const Tensor& other, double low,
                                                     double high) {
  Call call(of.x);
  const Tensor a = densified(of.x);
  check(other.scalar_type() == a.scalar_type() && has_shape_of(other, a),
        "a and b must have the same shape and dtype");
  check(low < high, "low must be less than high");
  const Tensor b = laid_out_as(call.on_device(other, "b"), a);
  Tensor y = empty_as(a), mask = empty_mask(a);
  add_observe_and_fake_quantize(call.launcher(), {dense(view(a), std::nullopt), b.const_data_ptr(), low, high},
                                call.flag(of.observer_enabled), call.flag(of.fake_quant_enabled),
                                call.observed(of.min_val, of.max_val, of.nonfinite_count),
                                call.qparams(of.scale, of.zero_point, of.eps), of.settings.averaging_constant,
                                of.settings.qparams, of.settings.nonfinite, y.mutable_data_ptr(), words(mask));
  return {y, mask};
}

// ------------------------------------------------------------------- batch norm as one

Dense dense_channels(const Tensor& x) {
  check(x.dim() >= 2 && x.dim() <= 5, "x must have 2 to 5 dimensions, got ", x.dim());
  return dense(view(x), 1);
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A contiguous tensor of the type in which x is computed.
Tensor empty_rows(int64_t rows, int64_t columns, const Tensor& x) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(2, sizes, strides, compute_type(x), x);
}

std::tuple<Tensor, Tensor> observe_batch_norm_(const FusedArguments& of, const BatchNormArguments& a) {
  Call call(of.x);
  const Tensor t = densified(of.x);
  const Dense x = dense_channels(t);
  check(!a.training || t.numel() == 0 || t.numel() != x.channels,
        "batch statistics need more than one value per channel");
  Tensor norm = empty_rows(4, x.channels, t), quantizer = empty_1d(3, ScalarType::Double, t);
  observe_batch_norm(call.launcher(), x,
                     {call.array(a.weight, "weight"), call.array(a.bias, "bias"),
                      call.array(a.running_mean, "running_mean"), call.array(a.running_var, "running_var")},
                     {a.training, a.momentum, a.eps, a.low, a.high}, call.flag(of.observer_enabled),
                     call.flag(of.fake_quant_enabled),
                     call.observed(of.min_val, of.max_val, of.nonfinite_count),
                     call.integer_qparams(of.scale, of.zero_point, of.eps), of.settings,
                     norm.mutable_data_ptr(), static_cast<double*>(quantizer.mutable_data_ptr()));
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
  const Tensor t = densified(x), whole_grad = laid_out_as(call.on_device(grad, "grad"), t);
  const Dense d = dense_channels(t);
  Tensor grad_x = empty_as(t);
  Tensor grad_weight = empty_1d(d.channels, compute_type(x), x), grad_bias = empty_as(grad_weight);
  batch_norm_backward(call.launcher(), d, whole_grad.const_data_ptr(), call.array(norm, "norm"),
                      call.array(quantizer, "quantizer"), {training, low, high, {quant_min, quant_max}},
                      grad_x.mutable_data_ptr(), call.array(grad_weight, "grad_weight"),
                      call.array(grad_bias, "grad_bias"));
  return {grad_x, grad_weight, grad_bias};
}

// ------------------------------------------------------------- weights folded with batch norm

Dense dense_weight(const Tensor& weight) {
  check(weight.dim() >= 2, "weight must have at least 2 dimensions, got ", weight.dim());
  return dense(view(weight), 0);
}

std::tuple<Tensor, Tensor> observe_folded_weight_(const FusedArguments& a, const Tensor& bn_weight,
                                                  const Tensor& bn_std) {
  Call call(a.x);
  const Tensor weight = densified(a.x);
  const Dense d = dense_weight(weight);
  const auto axis = a.settings.ch_axis;
  check(!axis.has_value() || *axis == 0 || *axis == -weight.dim(), "ch_axis must be None or 0");
  Tensor folded = empty_as(weight), fold = empty_rows(kFoldRows, d.channels, weight);
  observe_folded_weight(call.launcher(), d, call.array(bn_weight, "bn_weight"), call.array(bn_std, "bn_std"),
                        call.flag(a.observer_enabled), call.flag(a.fake_quant_enabled),
                        call.observed(a.min_val, a.max_val, a.nonfinite_count),
                        call.integer_qparams(a.scale, a.zero_point, a.eps), a.settings,
                        folded.mutable_data_ptr(), call.array(fold, "fold"));
  return {folded, fold};
}

Tensor fold_weight_op(const Tensor weight, const Tensor fold, int64_t quant_min, int64_t quant_max) {
  Call call(weight);
  const Tensor w = densified(weight);
  Tensor folded = empty_as(w);
  fold_weight(call.launcher(), dense_weight(w), call.array(fold, "fold"), {quant_min, quant_max},
              folded.mutable_data_ptr());
  return folded;
}

std::tuple<Tensor, Tensor> fold_weight_backward_op(const Tensor grad, const Tensor weight, const Tensor fold,
                                                   int64_t quant_min, int64_t quant_max) {
  Call call(weight);
  const Tensor w = densified(weight), whole_grad = laid_out_as(call.on_device(grad, "grad"), w);
  const Dense d = dense_weight(w);
  Tensor grad_weight = empty_as(w), grad_bn_weight = empty_1d(d.channels, w.scalar_type(), w);
  fold_weight_backward(call.launcher(), d, whole_grad.const_data_ptr(), call.array(fold, "fold"),
                       {quant_min, quant_max}, grad_weight.mutable_data_ptr(),
                       call.array(grad_bn_weight, "grad_bn_weight"));
  return {grad_weight, grad_bn_weight};
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
  const Tensor aligned = laid_out_as(call.on_device(grad, "grad"), t);
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
  using fastquant::add_op;
  using fastquant::batch_norm_op;
  using fastquant::folded_weight_op;
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
  m.impl("add_observe_fake_quantize", TORCH_BOX(&add_op<&add_observe_fake_quantize>));
  m.impl("observe_folded_weight_", TORCH_BOX(&folded_weight_op<&observe_folded_weight_>));
  m.impl("fold_weight", TORCH_BOX(&fold_weight_op));
  m.impl("fold_weight_backward", TORCH_BOX(&fold_weight_backward_op));
  m.impl("observe_batch_norm_", TORCH_BOX(&batch_norm_op<&observe_batch_norm_>));
  m.impl("batch_norm_fake_quantize", TORCH_BOX(&batch_norm_fake_quantize_op));
  m.impl("batch_norm_fake_quantize_backward", TORCH_BOX(&batch_norm_fake_quantize_backward));
  m.impl("learnable_fake_quantize", TORCH_BOX(&learnable_fake_quantize_op));
  m.impl("learnable_fake_quantize_backward", TORCH_BOX(&learnable_fake_quantize_backward));
}
