// Registers the CPU implementations of the ops in library.cpp. They check tensors, allocate outputs, and run on
// torch's thread pool.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../fused_arguments.h"
#include "batch_norm.h"
#include "clamped_sum.h"
#include "errors.h"
#include "fake_quantize.h"
#include "folded_weight.h"
#include "huge_pages.h"
#include "quantized/elementwise.h"
#include "ranges.h"
#include "statistics.h"

namespace fastquant {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_parallel(int64_t count, void (*f)(void* context, int64_t i), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(context, i);
  });
}

namespace {

// ------------------------------------------------------------------ tensors as memory

Array array(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU as x is");
  check(t.is_contiguous(), name, " must be contiguous");
  check(element(t.scalar_type()) != Element::other, name, " has a dtype that nothing can be kept in");
  return {t.mutable_data_ptr(), element(t.scalar_type()), t.numel(), name};
}

Array single(const Tensor& t, const char* name) {
  const Array a = array(t, name);
  check_count(a, 1);
  return a;
}

Tensor empty_output(const Tensor& like) {
  Tensor output = empty_as(like);
  prefer_huge_pages(output.mutable_data_ptr(), output.numel() * static_cast<int64_t>(output.element_size()));
  return output;
}

// Whether a flag of any integer type is not zero.
bool flag(const Tensor& t) {
  check(t.numel() == 1 && t.is_cpu(), "a flag must be a CPU tensor of one element");
  const auto* bytes = static_cast<const uint8_t*>(t.const_data_ptr());
  return std::any_of(bytes, bytes + t.element_size(), [](uint8_t b) { return b != 0; });
}

// ---------------------------------------------------------------------------- observe

void observe_minmax_(const Tensor x, Tensor min_val, Tensor max_val, Tensor nonfinite_count,
                     std::optional<int64_t> ch_axis, std::optional<double> averaging_constant,
                     int64_t nonfinite) {
  const Tensor t = densified(x);
  observe_minmax(dense(view(t), ch_axis), array(min_val, "min_val"), array(max_val, "max_val"),
                 single(nonfinite_count, "nonfinite_count"), averaging_constant,
                 static_cast<NonFinite>(nonfinite));
}

void observe_histogram_(const Tensor x, Tensor histogram, Tensor min_val, Tensor max_val,
                        Tensor nonfinite_count, int64_t upsample_rate, int64_t nonfinite, int64_t times) {
  const Tensor t = densified(x);
  observe_histogram(dense(view(t), std::nullopt), array(histogram, "histogram"), array(min_val, "min_val"),
                    array(max_val, "max_val"), single(nonfinite_count, "nonfinite_count"), upsample_rate,
                    static_cast<NonFinite>(nonfinite), times);
}

void observe_channel_histograms_(const Tensor x, Tensor histogram, Tensor min_val, Tensor max_val,
                                 Tensor nonfinite_count, int64_t ch_axis, int64_t upsample_rate,
                                 int64_t nonfinite) {
  const Tensor t = densified(x);
  observe_channel_histograms(dense(view(t), ch_axis), array(histogram, "histogram"), array(min_val, "min_val"),
                             array(max_val, "max_val"), single(nonfinite_count, "nonfinite_count"),
                             upsample_rate, static_cast<NonFinite>(nonfinite));
}

// x as it would lie in memory if it had the strides of `like`, which is dense and has its shape.
Tensor laid_out_as(const Tensor& like, const Tensor& x) {
  const auto sizes = like.sizes(), s = like.strides(), t = x.strides();
  bool same = true, last = like.is_contiguous() && like.dim() > 2;
  int64_t pixels = 1, stride = last ? sizes[1] : 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    same &= sizes[d] == 1 || s[d] == t[d];
    if (d < 2) continue;
    last &= sizes[d] == 1 || t[d] == stride;
    stride *= sizes[d];
    pixels *= sizes[d];
  }
  if (same) return x;
  Tensor copy = empty_as(like, x.scalar_type());
  last = last && t[1] == 1 && (sizes[0] == 1 || t[0] == stride);
  if (last && x.element_size() == 1) {  // channels_last to contiguous
    transpose(static_cast<const uint8_t*>(x.const_data_ptr()), sizes[0], pixels, sizes[1],
              static_cast<uint8_t*>(copy.mutable_data_ptr()));
  } else {
    torch::stable::copy_(copy, x);
  }
  return copy;
}

void observe_error_op(const Tensor reference, const Tensor x, std::optional<double> scale, int64_t zero_point,
                      int64_t quant_min, int64_t quant_max, Tensor sums, Tensor integers) {
  const auto sizes = reference.sizes(), other = x.sizes();
  check(reference.scalar_type() == ScalarType::Float, "reference must be float32");
  check(std::equal(sizes.begin(), sizes.end(), other.begin(), other.end()) && x.is_cpu(),
        "reference and x must have the same shape and device");
  const Array into = array(sums, "sums");
  const int64_t used = integers.numel();
  check(into.type == Element::f64 && into.numel == kErrorSums, "sums must be ", int(kErrorSums), " float64");
  check(integers.scalar_type() == ScalarType::Byte && integers.is_cpu() && integers.is_contiguous(),
        "integers must be contiguous uint8 on the CPU");
  const Tensor a = densified(reference), b = laid_out_as(a, x);
  const int64_t n = a.numel();
  auto* const totals = static_cast<double*>(into.data);
  const auto* const exact = static_cast<const float*>(a.const_data_ptr());
  if (x.scalar_type() == ScalarType::Float) {
    std::optional<RoundedTo> grid;
    if (scale.has_value()) grid = {static_cast<float>(*scale), zero_point, quant_min, quant_max};
    check(used == 0 || (grid.has_value() && used == grid->levels()),
          "integers must have an entry for each integer of a grid, or none");
    observe_error(exact, static_cast<const float*>(b.const_data_ptr()), n, grid, totals,
                  used == 0 ? nullptr : static_cast<uint8_t*>(integers.mutable_data_ptr()));
    return;
  }
  const bool is_signed = x.scalar_type() == ScalarType::Char;
  check(is_signed || x.scalar_type() == ScalarType::Byte, "x must be float32, or integers as uint8 or int8");
  check(scale.has_value() && used == 0, "integers x need a scale, and no others are counted");
  observe_error(exact, static_cast<const uint8_t*>(b.const_data_ptr()), n, {*scale, zero_point, is_signed},
                totals);
}

FusedBuffers buffers_of(const FusedArguments& a) {
  return {array(a.min_val, "min_val"),
          array(a.max_val, "max_val"),
          array(a.scale, "scale"),
          array(a.zero_point, "zero_point"),
          single(a.nonfinite_count, "nonfinite_count"),
          single(a.eps, "eps")};
}

void observe_qparams_(const FusedArguments& a) {
  if (!flag(a.observer_enabled)) return;
  const Tensor t = densified(a.x);
  observe_qparams(dense(view(t), a.settings.ch_axis), buffers_of(a), a.settings);
}

// ----------------------------------------------------------------- quantization params

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor min_val, const Tensor max_val, const Tensor eps,
                                             int64_t quant_min, int64_t quant_max, int64_t scheme,
                                             int64_t symmetric_zero_point) {
  const QParamsConfig config = {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point};
  Tensor scale = empty_1d(min_val.numel(), min_val.scalar_type(), min_val);
  const ScalarType type = config.scheme == Scheme::affine      ? ScalarType::Int
                          : config.scheme == Scheme::symmetric ? ScalarType::Long
                                                               : min_val.scalar_type();
  Tensor zero_point = empty_1d(min_val.numel(), type, min_val);
  choose_qparams(array(min_val, "min_val"), array(max_val, "max_val"), single(eps, "eps"), config,
                 array(scale, "scale"), array(zero_point, "zero_point"));
  return {scale, zero_point};
}

std::tuple<Tensor, Tensor> search_histogram_range_op(const Tensor histogram, const Tensor min_val,
                                                     const Tensor max_val, int64_t dst_nbins) {
  Tensor new_min = empty_as(min_val), new_max = empty_as(max_val);
  search_histogram_range(array(histogram, "histogram"), array(min_val, "min_val"), array(max_val, "max_val"),
                         dst_nbins, array(new_min, "new_min"), array(new_max, "new_max"));
  return {new_min, new_max};
}

std::tuple<Tensor, Tensor> histogram_range_op(const Tensor histogram, const Tensor min_val,
                                              const Tensor max_val, int64_t method, double percentile,
                                              int64_t search_levels, int64_t quant_min, int64_t quant_max,
                                              int64_t scheme, int64_t symmetric_zero_point) {
  const RangeSettings settings = {static_cast<RangeMethod>(method),
                                  percentile,
                                  search_levels,
                                  {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point}};
  Tensor new_min = empty_as(min_val), new_max = empty_as(max_val);
  histogram_range(array(histogram, "histogram"), array(min_val, "min_val"), array(max_val, "max_val"), settings,
                  array(new_min, "new_min"), array(new_max, "new_max"));
  return {new_min, new_max};
}

// The dtype of arithmetic on x.
ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> least_error_range_op(const Tensor x, std::optional<int64_t> ch_axis,
                                                int64_t quant_min, int64_t quant_max, int64_t scheme,
                                                int64_t symmetric_zero_point) {
  const Tensor t = densified(x);
  const Dense channels = dense(view(t), ch_axis);
  Tensor new_min = empty_1d(channels.channels, compute_type(t), t), new_max = empty_as(new_min);
  least_error_range(channels, {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point},
                    array(new_min, "new_min"), array(new_max, "new_max"));
  return {new_min, new_max};
}

Tensor histogram_error_op(const Tensor histogram, const Tensor min_val, const Tensor max_val,
                          const Tensor scale, const Tensor zero_point, int64_t quant_min, int64_t quant_max) {
  Tensor error = empty_as(min_val, ScalarType::Double);
  histogram_error(array(histogram, "histogram"), array(min_val, "min_val"), array(max_val, "max_val"),
                  array(scale, "scale"), array(zero_point, "zero_point"), quant_min, quant_max,
                  array(error, "error"));
  return error;
}

// ---------------------------------------------------------------------- fake-quantize

Tensor quantize_dense(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                      std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max, uint64_t* mask) {
  Tensor y = empty_output(x);
  fake_quantize(dense(view(x), ch_axis), array(scale, "scale"), array(zero_point, "zero_point"), quant_min,
                quant_max, y.mutable_data_ptr(), mask);
  return y;
}

// For x that is already dense, and an `enabled` flag that was already read.
Tensor quantize_or_copy(const Tensor& x, const Tensor& scale, const Tensor& zero_point, bool enabled,
                        std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max) {
  if (!enabled) return torch::stable::clone(x);
  return quantize_dense(x, scale, zero_point, ch_axis, quant_min, quant_max, nullptr);
}

std::tuple<Tensor, Tensor> quantize_or_copy_with_mask(const Tensor& x, const Tensor& scale,
                                                      const Tensor& zero_point, bool enabled,
                                                      std::optional<int64_t> ch_axis, int64_t quant_min,
                                                      int64_t quant_max) {
  Tensor mask = empty_1d(mask_words(x.numel()) * 8, ScalarType::Byte, x);
  auto* words = static_cast<uint64_t*>(mask.mutable_data_ptr());
  if (!enabled) {
    fill_mask(words, x.numel());
    return {torch::stable::clone(x), mask};
  }
  Tensor y = quantize_dense(x, scale, zero_point, ch_axis, quant_min, quant_max, words);
  return {y, mask};
}

bool enabled_by(const std::optional<Tensor>& enabled) { return !enabled.has_value() || flag(*enabled); }

Tensor fake_quantize_op(const Tensor x, const Tensor scale, const Tensor zero_point,
                        const std::optional<Tensor> enabled, std::optional<int64_t> ch_axis, int64_t quant_min,
                        int64_t quant_max) {
  return quantize_or_copy(densified(x), scale, zero_point, enabled_by(enabled), ch_axis, quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fake_quantize_with_mask(const Tensor x, const Tensor scale, const Tensor zero_point,
                                                   const std::optional<Tensor> enabled,
                                                   std::optional<int64_t> ch_axis, int64_t quant_min,
                                                   int64_t quant_max) {
  return quantize_or_copy_with_mask(densified(x), scale, zero_point, enabled_by(enabled), ch_axis, quant_min,
                                    quant_max);
}

Tensor fake_quantize_backward(const Tensor grad, const Tensor mask) {
  check(is_dense(view(grad)), "grad must have the layout of the output");
  check(mask.numel() == mask_words(grad.numel()) * 8, "mask is not grad's");
  const Tensor words = mask_words_of(mask);
  Tensor out = empty_output(grad);
  mask_gradient(dense(view(grad), std::nullopt), static_cast<const uint64_t*>(words.const_data_ptr()),
                out.mutable_data_ptr());
  return out;
}

Tensor quantize_per_channel_op(const Tensor x, const Tensor scale, int64_t ch_axis, int64_t quant_min,
                               int64_t quant_max) {
  const Tensor t = densified(x);
  Tensor out = empty_as(t, ScalarType::Char);
  quantize_per_channel(dense(view(t), ch_axis), array(scale, "scale"), quant_min, quant_max,
                       static_cast<int8_t*>(out.mutable_data_ptr()));
  return out;
}

// What both fused ops return first, for x that is already dense. `mask` may be null.
Tensor observed_and_quantized(const FusedArguments& a, uint64_t* mask) {
  if (!flag(a.fake_quant_enabled)) {
    observe_qparams_(a);
    if (mask != nullptr) fill_mask(mask, a.x.numel());
    return torch::stable::clone(a.x);
  }
  const QParamsConfig& q = a.settings.qparams;
  if (!flag(a.observer_enabled)) {
    return quantize_dense(a.x, a.scale, a.zero_point, a.settings.ch_axis, q.quant_min, q.quant_max, mask);
  }
  Tensor y = empty_output(a.x);
  observe_fake_quantize(dense(view(a.x), a.settings.ch_axis), buffers_of(a), a.settings, y.mutable_data_ptr(),
                        mask);
  return y;
}

Tensor fused_observe_fake_quantize(FusedArguments a) {
  a.x = densified(a.x);
  return observed_and_quantized(a, nullptr);
}

std::tuple<Tensor, Tensor> fused_observe_fake_quantize_with_mask(FusedArguments a) {
  a.x = densified(a.x);
  Tensor mask = empty_1d(mask_words(a.x.numel()) * 8, ScalarType::Byte, a.x);
  Tensor y = observed_and_quantized(a, static_cast<uint64_t*>(mask.mutable_data_ptr()));
  return {y, mask};
}

std::tuple<Tensor, Tensor> add_observe_fake_quantize(const FusedArguments& of, const Tensor& other, double low,
                                                     double high) {
  const Tensor a = densified(of.x);
  const auto sizes = a.sizes(), other_sizes = other.sizes();
  check(other.scalar_type() == a.scalar_type() &&
            std::equal(sizes.begin(), sizes.end(), other_sizes.begin(), other_sizes.end()),
        "a and b must have the same shape and dtype");
  check(other.is_cpu(), "b must be on the CPU as a is");
  check(low < high, "low must be less than high");
  Tensor b = other;
  if (!has_layout_of(b, a)) {
    b = empty_as(a);
    torch::stable::copy_(b, other);
  }
  const SumOfTensors sum = {dense(view(a), std::nullopt), b.const_data_ptr(), low, high};
  const FusedBuffers buffers = buffers_of(of);
  const bool observes = flag(of.observer_enabled), quantizes = flag(of.fake_quant_enabled);
  Tensor y = empty_output(a), mask = empty_1d(mask_words(a.numel()) * 8, ScalarType::Byte, a);
  auto* const words = static_cast<uint64_t*>(mask.mutable_data_ptr());
  void* const to = y.mutable_data_ptr();
  const QParamsConfig& q = of.settings.qparams;
  if (observes && quantizes) {
    observe_fake_quantize_clamped_sum(sum, buffers, of.settings, to, words);
  } else if (quantizes) {
    fake_quantize_clamped_sum(sum, buffers.scale, buffers.zero_point, q.quant_min, q.quant_max, to, words);
  } else {
    if (observes) observe_clamped_sum(sum, buffers, of.settings);
    clamped_sum(sum, to, words);
  }
  return {y, mask};
}

// ----------------------------------------------------- weights folded with batch norm

// A dense weight as its output channels, the first axis.
Dense channels_of(const Tensor& weight) {
  check(weight.dim() >= 2, "weight must have at least 2 dimensions");
  return dense(view(weight), 0);
}

// A tensor that lies in memory as a weight does.
Array aligned_with_weight(const Tensor& t, const char* name) {
  return {t.mutable_data_ptr(), element(t.scalar_type()), t.numel(), name};
}

std::tuple<Tensor, Tensor> observe_folded_weight_(const FusedArguments& a, const Tensor& bn_weight,
                                                  const Tensor& bn_std) {
  const Tensor weight = densified(a.x);
  const auto axis = a.settings.ch_axis;
  check(!axis.has_value() || *axis == 0 || *axis == -weight.dim(), "ch_axis must be None or 0");
  Tensor folded = empty_output(weight);
  const int64_t channels = channels_of(weight).channels, sizes[] = {kFoldRows, channels},
                strides[] = {std::max<int64_t>(channels, 1), 1};
  Tensor fold = empty_strided(2, sizes, strides, compute_type(weight), weight);
  observe_folded_weight(channels_of(weight), array(bn_weight, "bn_weight"), array(bn_std, "bn_std"),
                        buffers_of(a), a.settings, flag(a.observer_enabled), flag(a.fake_quant_enabled),
                        aligned_with_weight(folded, "folded"), array(fold, "fold"));
  return {folded, fold};
}

Tensor fold_weight_op(const Tensor weight, const Tensor fold, int64_t quant_min, int64_t quant_max) {
  const Tensor w = densified(weight);
  Tensor folded = empty_output(w);
  fold_weight(channels_of(w), array(fold, "fold"), quant_min, quant_max, aligned_with_weight(folded, "folded"));
  return folded;
}

std::tuple<Tensor, Tensor> fold_weight_backward_op(const Tensor grad, const Tensor weight, const Tensor fold,
                                                   int64_t quant_min, int64_t quant_max) {
  const Tensor w = densified(weight);
  Tensor aligned = grad;
  if (!has_layout_of(grad, w)) {
    aligned = empty_as(w);
    torch::stable::copy_(aligned, grad);
  }
  Tensor grad_weight = empty_output(w), grad_bn_weight = empty_1d(fold.size(1), w.scalar_type(), w);
  fold_weight_backward(channels_of(w), aligned_with_weight(aligned, "grad"), array(fold, "fold"), quant_min,
                       quant_max, grad_weight.mutable_data_ptr(), array(grad_bn_weight, "grad_bn_weight"));
  return {grad_weight, grad_bn_weight};
}

// ------------------------------------------------------------------------- batch norm

Dense batch_norm_input(const Tensor& x) {
  check(2 <= x.dim() && x.dim() <= 5, "x must have 2 to 5 dimensions, got ", x.dim());
  return dense(view(x), 1);
}

std::tuple<Tensor, Tensor> observe_batch_norm_(const FusedArguments& of, const BatchNormArguments& a) {
  const Tensor t = densified(of.x);
  const Dense x = batch_norm_input(t);
  const int64_t sizes[] = {4, x.channels}, strides[] = {std::max<int64_t>(x.channels, 1), 1};
  Tensor norm = empty_strided(2, sizes, strides, compute_type(t), t);
  Tensor quantizer = empty_1d(3, ScalarType::Double, t);
  const BatchNorm batch_norm = {array(a.weight, "weight"),
                                array(a.bias, "bias"),
                                array(a.running_mean, "running_mean"),
                                array(a.running_var, "running_var"),
                                a.training,
                                a.momentum,
                                a.eps};
  const ObservedQuantizer observed = {buffers_of(of), of.settings, flag(of.observer_enabled),
                                      flag(of.fake_quant_enabled)};
  observe_batch_norm(x, batch_norm, {a.low, a.high}, observed, norm.mutable_data_ptr(),
                     static_cast<double*>(quantizer.mutable_data_ptr()));
  return {norm, quantizer};
}

Tensor batch_norm_fake_quantize_op(const Tensor x, const Tensor, const Tensor, const Tensor norm,
                                   const Tensor quantizer, bool, double low, double high, int64_t quant_min,
                                   int64_t quant_max) {
  const Tensor t = densified(x);
  Tensor y = empty_output(t);
  batch_norm_fake_quantize(batch_norm_input(t), array(norm, "norm"), array(quantizer, "quantizer"), {low, high},
                           {quant_min, quant_max}, y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fake_quantize_backward_op(const Tensor grad, const Tensor x,
                                                                        const Tensor norm,
                                                                        const Tensor quantizer, bool training,
                                                                        double low, double high,
                                                                        int64_t quant_min, int64_t quant_max) {
  const Tensor t = densified(x);
  const auto sizes = grad.sizes(), sizes_of_x = x.sizes();
  check(std::equal(sizes.begin(), sizes.end(), sizes_of_x.begin(), sizes_of_x.end()),
        "grad must have the shape of x");
  Tensor aligned = grad;
  if (!has_layout_of(grad, t)) {
    aligned = empty_as(t);
    torch::stable::copy_(aligned, grad);
  }
  Tensor grad_x = empty_output(t);
  const Dense d = batch_norm_input(t);
  Tensor grad_weight = empty_1d(d.channels, norm.scalar_type(), norm), grad_bias = empty_as(grad_weight);
  batch_norm_fake_quantize_backward(d, aligned.const_data_ptr(), array(norm, "norm"),
                                    array(quantizer, "quantizer"), training, {low, high},
                                    {quant_min, quant_max}, grad_x.mutable_data_ptr(),
                                    array(grad_weight, "grad_weight"), array(grad_bias, "grad_bias"));
  return {grad_x, grad_weight, grad_bias};
}

// -------------------------------------------------------------------------- learnable

Tensor learnable_fake_quantize(const Tensor x, const Tensor scale, const Tensor zero_point,
                               std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max, double) {
  auto whole = whole_zero_points(array(zero_point, "zero_point"), quant_min, quant_max);
  const Array zero_points = {whole.data(), Element::i64, static_cast<int64_t>(whole.size()), "zero_point"};
  const Tensor t = densified(x);
  Tensor y = empty_output(t);
  fake_quantize(dense(view(t), ch_axis), array(scale, "scale"), zero_points, quant_min, quant_max,
                y.mutable_data_ptr(), nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> learnable_fake_quantize_backward(const Tensor grad, const Tensor x,
                                                                    const Tensor scale, const Tensor zero_point,
                                                                    std::optional<int64_t> ch_axis,
                                                                    int64_t quant_min, int64_t quant_max,
                                                                    double grad_factor) {
  const Tensor t = densified(x);
  Tensor aligned = empty_as(t);
  torch::stable::copy_(aligned, grad);
  Tensor grad_x = empty_output(t), grad_scale = empty_as(scale), grad_zero_point = empty_as(zero_point);
  learnable_backward(dense(view(t), ch_axis), aligned.const_data_ptr(), array(scale, "scale"),
                     array(zero_point, "zero_point"), quant_min, quant_max, grad_factor,
                     grad_x.mutable_data_ptr(), array(grad_scale, "grad_scale"),
                     array(grad_zero_point, "grad_zero_point"));
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("observe_minmax_", TORCH_BOX(&observe_minmax_));
  m.impl("observe_histogram_", TORCH_BOX(&observe_histogram_));
  m.impl("observe_channel_histograms_", TORCH_BOX(&observe_channel_histograms_));
  m.impl("observe_error_", TORCH_BOX(&observe_error_op));
  m.impl("observe_qparams_", TORCH_BOX(&observe_op<&observe_qparams_>));
  m.impl("search_histogram_range", TORCH_BOX(&search_histogram_range_op));
  m.impl("histogram_range", TORCH_BOX(&histogram_range_op));
  m.impl("least_error_range", TORCH_BOX(&least_error_range_op));
  m.impl("histogram_error", TORCH_BOX(&histogram_error_op));
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
  m.impl("batch_norm_fake_quantize_backward", TORCH_BOX(&batch_norm_fake_quantize_backward_op));
  m.impl("learnable_fake_quantize", TORCH_BOX(&learnable_fake_quantize));
  m.impl("learnable_fake_quantize_backward", TORCH_BOX(&learnable_fake_quantize_backward));
}

}  // namespace fastquant
