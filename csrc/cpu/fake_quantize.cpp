// Fake-quantize, forward and backward; fused with observing; with learnable parameters.
#include <tuple>

#include "observe.h"

namespace fastquant {
namespace {

constexpr int64_t kWord = 64;  // elements of one word of the mask

// Rows at least this long have their parameters broadcast; shorter ones repeat a pattern.
constexpr int64_t kShortRow = 32;

// Owns the arrays that QuantParams points to.
template <class T>
class ParamArrays {
 public:
  ParamArrays(const Dense& d, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max)
      : periodic_(d.channels > 1 && d.inner < kShortRow) {
    params_.quant_min = quant_min;
    params_.quant_max = quant_max;
    params_.channels = d.channels;
    params_.inner = std::max<int64_t>(d.inner, 1);
    const ScalarType type = zero_point.scalar_type();
    params_.float_zero_point = type != ScalarType::Int && type != ScalarType::Long;
    params_.exact = params_.float_zero_point;
    scale_ = read_values<T>(scale);
    zero_point_ = read_values<T>(zero_point);
    for (size_t c = 0; c < scale_.size(); ++c) {
      // The reciprocal is taken in the scale's own precision, as torch does.
      inverse_scale_.push_back(is_double(scale) ? static_cast<T>(1.0 / static_cast<double>(scale_[c]))
                                                : static_cast<T>(1.0f / static_cast<float>(scale_[c])));
      low_.push_back(static_cast<T>(quant_min) - zero_point_[c]);
      high_.push_back(static_cast<T>(quant_max) - zero_point_[c]);
      // Half a step outside still rounds into the range if the bound is even.
      low_edge_.push_back(edge(low_[c], -1));
      high_edge_.push_back(edge(high_[c], 1));
      const bool fits = std::abs(low_[c]) <= fast_bound<T>() && std::abs(high_[c]) <= fast_bound<T>();
      params_.exact |= !fits || !std::isnormal(scale_[c]);
    }
    params_.period = 0;
    if (periodic_) {
      const int64_t pattern = d.channels * d.inner;
      params_.period = pattern * ((kPeriodPadding + pattern - 1) / pattern);
      for (std::vector<T>* values :
           {&scale_, &inverse_scale_, &zero_point_, &low_, &high_, &low_edge_, &high_edge_}) {
        repeat(values, d);
      }
    }
    params_.scale = scale_.data();
    params_.inverse_scale = inverse_scale_.data();
    params_.zero_point = zero_point_.data();
    params_.low = low_.data();
    params_.high = high_.data();
    params_.low_edge = low_edge_.data();
    params_.high_edge = high_edge_.data();
  }

  const QuantParams<T>& get() const { return params_; }
  bool periodic() const { return periodic_; }

 private:
  // The furthest value on that side of a whole bound that rounds to it, ties to even.
  static T edge(T bound, int side) {
    const T half = bound + static_cast<T>(0.5) * static_cast<T>(side);
    return std::fmod(bound, T{2}) == T{0} ? half : std::nextafter(half, bound);
  }

  // One value a channel becomes one value an element, over and over.
  void repeat(std::vector<T>* values, const Dense& d) const {
    std::vector<T> repeated;
    const int64_t length = params_.period + kPeriodPadding;
    repeated.reserve(length + d.inner);
    while (static_cast<int64_t>(repeated.size()) < length) {
      for (T value : *values) repeated.insert(repeated.end(), d.inner, value);
    }
    values->swap(repeated);
  }

  bool periodic_;
  QuantParams<T> params_;
  std::vector<T> scale_, inverse_scale_, zero_point_, low_, high_, low_edge_, high_edge_;
};

Tensor empty_mask(int64_t numel) { return empty_1d((numel + kWord - 1) / kWord * 8, ScalarType::Byte); }

uint64_t* mask_words(Tensor& mask) { return static_cast<uint64_t*>(mask.mutable_data_ptr()); }

// y, and where `mask` is not null the mask, of a dense x.
Tensor quantize_dense(const Dense& d, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                      int64_t quant_max, uint64_t* mask) {
  Tensor y = empty_as(d.tensor);
  check_buffer(scale, d.channels, "scale");
  check_buffer(zero_point, d.channels, "zero_point");
  with_stored_type(d.tensor.scalar_type(), [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const ParamArrays<T> params(d, scale, zero_point, quant_min, quant_max);
    const auto& table = kernels_of(S{});
    const auto kernel = params.periodic() ? table.fake_quantize_periodic : table.fake_quantize_rows;
    const S* from = static_cast<const S*>(d.tensor.const_data_ptr());
    S* to = static_cast<S*>(y.mutable_data_ptr());
    for_pieces(d.numel(), piece_count(d.numel()), kWord, [&](int64_t, int64_t begin, int64_t end) {
      if (begin < end) kernel(from, to, mask, begin, end, params.get());
    });
  });
  return y;
}

void fill_mask(Tensor& mask, int64_t numel) {
  uint64_t* words = mask_words(mask);
  std::fill(words, words + numel / kWord, ~uint64_t{0});
  if (numel % kWord != 0) words[numel / kWord] = (uint64_t{1} << (numel % kWord)) - 1;
}

Tensor quantize_or_copy(const Dense& d, const Tensor& scale, const Tensor& zero_point, bool enabled,
                        int64_t quant_min, int64_t quant_max) {
  if (enabled) return quantize_dense(d, scale, zero_point, quant_min, quant_max, nullptr);
  return torch::stable::clone(d.tensor);
}

std::tuple<Tensor, Tensor> quantize_or_copy_with_mask(const Dense& d, const Tensor& scale,
                                                      const Tensor& zero_point, bool enabled, int64_t quant_min,
                                                      int64_t quant_max) {
  Tensor mask = empty_mask(d.numel());
  if (enabled) {
    Tensor y = quantize_dense(d, scale, zero_point, quant_min, quant_max, mask_words(mask));
    return {y, mask};
  }
  fill_mask(mask, d.numel());
  return {torch::stable::clone(d.tensor), mask};
}

bool enabled_by(const std::optional<Tensor>& enabled) { return !enabled.has_value() || flag(*enabled); }

Tensor fake_quantize(const Tensor x, const Tensor scale, const Tensor zero_point,
                     const std::optional<Tensor> enabled, std::optional<int64_t> ch_axis, int64_t quant_min,
                     int64_t quant_max) {
  return quantize_or_copy(dense(x, ch_axis), scale, zero_point, enabled_by(enabled), quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fake_quantize_with_mask(const Tensor x, const Tensor scale, const Tensor zero_point,
                                                   const std::optional<Tensor> enabled,
                                                   std::optional<int64_t> ch_axis, int64_t quant_min,
                                                   int64_t quant_max) {
  return quantize_or_copy_with_mask(dense(x, ch_axis), scale, zero_point, enabled_by(enabled), quant_min,
                                    quant_max);
}

Tensor fake_quantize_backward(const Tensor grad, const Tensor mask) {
  STD_TORCH_CHECK(is_dense(grad), "fastquant: grad must have the layout of the output");
  const int64_t n = grad.numel();
  STD_TORCH_CHECK(mask.numel() == (n + kWord - 1) / kWord * 8, "fastquant: mask is not grad's");
  Tensor out = empty_as(grad);
  with_stored_type(grad.scalar_type(), [&](auto stored) {
    using S = decltype(stored);
    const S* from = static_cast<const S*>(grad.const_data_ptr());
    S* to = static_cast<S*>(out.mutable_data_ptr());
    const auto* words = static_cast<const uint64_t*>(mask.const_data_ptr());
    for_pieces(n, piece_count(n), kWord, [&](int64_t, int64_t begin, int64_t end) {
      kernels_of(S{}).mask_gradient(from, words, to, begin, end);
    });
  });
  return out;
}

// ------------------------------------------------------------------------------ fused

void observe_qparams_(const Tensor x, const Tensor observer_enabled, Tensor min_val, Tensor max_val, Tensor scale,
                      Tensor zero_point, Tensor nonfinite_count, const Tensor eps, std::optional<int64_t> ch_axis,
                      std::optional<double> averaging_constant, int64_t quant_min, int64_t quant_max,
                      int64_t scheme, int64_t symmetric_zero_point, int64_t nonfinite) {
  if (!flag(observer_enabled)) return;
  const int64_t channels = min_val.numel();
  check_buffer(scale, channels, "scale");
  check_buffer(zero_point, channels, "zero_point");
  observe_minmax(x, min_val, max_val, nonfinite_count, ch_axis, averaging_constant, nonfinite);
  choose_qparams_into(min_val, max_val, eps,
                      {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point}, scale,
                      zero_point);
}

Tensor fused_observe_fake_quantize(const Tensor x, const Tensor observer_enabled, const Tensor fake_quant_enabled,
                                   Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point,
                                   Tensor nonfinite_count, const Tensor eps, std::optional<int64_t> ch_axis,
                                   std::optional<double> averaging_constant, int64_t quant_min, int64_t quant_max,
                                   int64_t scheme, int64_t symmetric_zero_point, int64_t nonfinite) {
  const Dense d = dense(x, ch_axis);
  observe_qparams_(d.tensor, observer_enabled, min_val, max_val, scale, zero_point, nonfinite_count, eps, ch_axis,
                   averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite);
  return quantize_or_copy(d, scale, zero_point, flag(fake_quant_enabled), quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fused_observe_fake_quantize_with_mask(
    const Tensor x, const Tensor observer_enabled, const Tensor fake_quant_enabled, Tensor min_val, Tensor max_val,
    Tensor scale, Tensor zero_point, Tensor nonfinite_count, const Tensor eps, std::optional<int64_t> ch_axis,
    std::optional<double> averaging_constant, int64_t quant_min, int64_t quant_max, int64_t scheme,
    int64_t symmetric_zero_point, int64_t nonfinite) {
  const Dense d = dense(x, ch_axis);
  observe_qparams_(d.tensor, observer_enabled, min_val, max_val, scale, zero_point, nonfinite_count, eps, ch_axis,
                   averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite);
  return quantize_or_copy_with_mask(d, scale, zero_point, flag(fake_quant_enabled), quant_min, quant_max);
}

// -------------------------------------------------------------------------- learnable

// The whole zero points that learnable ones stand for.
std::vector<double> whole_zero_points(const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  std::vector<double> values = read_values<double>(zero_point);
  for (double& z : values) {
    z = std::min(std::max(std::nearbyint(z), static_cast<double>(quant_min)), static_cast<double>(quant_max));
  }
  return values;
}

Tensor learnable_fake_quantize(const Tensor x, const Tensor scale, const Tensor zero_point,
                               std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max, double) {
  const Dense d = dense(x, ch_axis);
  check_buffer(zero_point, d.channels, "zero_point");
  Tensor whole = empty_1d(d.channels, ScalarType::Long);
  write_values(whole, whole_zero_points(zero_point, quant_min, quant_max));
  return quantize_dense(d, scale, whole, quant_min, quant_max, nullptr);
}

// One stretch of one channel, short enough that its sums, added up in order, come out the
// same on any number of threads.
struct Stretch {
  int64_t channel, begin, end;
};

std::vector<Stretch> stretches_of(const Dense& d) {
  constexpr int64_t kLength = 16384;
  std::vector<Stretch> stretches;
  for (int64_t row = 0; row < d.outer * d.channels; ++row) {
    for (int64_t i = 0; i < d.inner; i += kLength) {
      const int64_t begin = row * d.inner + i;
      stretches.push_back({row % d.channels, begin, row * d.inner + std::min(i + kLength, d.inner)});
    }
  }
  return stretches;
}

std::tuple<Tensor, Tensor, Tensor> learnable_fake_quantize_backward(const Tensor grad, const Tensor x,
                                                                    const Tensor scale, const Tensor zero_point,
                                                                    std::optional<int64_t> ch_axis,
                                                                    int64_t quant_min, int64_t quant_max,
                                                                    double grad_factor) {
  const Dense d = dense(x, ch_axis);
  check_buffer(scale, d.channels, "scale");
  check_buffer(zero_point, d.channels, "zero_point");
  Tensor aligned = empty_as(d.tensor);
  torch::stable::copy_(aligned, grad);
  Tensor grad_x = empty_as(d.tensor), grad_scale = empty_as(scale), grad_zero_point = empty_as(zero_point);
  const std::vector<Stretch> stretches = stretches_of(d);
  const int64_t count = static_cast<int64_t>(stretches.size());
  std::vector<LearnableSums> sums(count);
  const std::vector<double> scales = read_values<double>(scale);
  const std::vector<double> zero_points = whole_zero_points(zero_point, quant_min, quant_max);
  with_stored_type(x.scalar_type(), [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const S* g = static_cast<const S*>(aligned.const_data_ptr());
    const S* from = static_cast<const S*>(d.tensor.const_data_ptr());
    S* to = static_cast<S*>(grad_x.mutable_data_ptr());
    for_pieces(count, std::min(piece_count(d.numel()), count), 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Stretch& s = stretches[i];
        sums[i] = kernels_of(S{}).learnable_backward(
            g + s.begin, from + s.begin, to + s.begin, s.end - s.begin,
            static_cast<T>(scales[s.channel]), static_cast<T>(zero_points[s.channel]), static_cast<T>(quant_min),
            static_cast<T>(quant_max), static_cast<T>(grad_factor));
      }
    });
  });
  std::vector<double> scale_totals(d.channels, 0.0), zero_point_totals(d.channels, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    scale_totals[stretches[i].channel] += sums[i].scale;
    zero_point_totals[stretches[i].channel] += sums[i].zero_point;
  }
  write_values(grad_scale, scale_totals);
  write_values(grad_zero_point, zero_point_totals);
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("observe_qparams_", TORCH_BOX(&observe_qparams_));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_with_mask", TORCH_BOX(&fake_quantize_with_mask));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fused_observe_fake_quantize", TORCH_BOX(&fused_observe_fake_quantize));
  m.impl("fused_observe_fake_quantize_with_mask", TORCH_BOX(&fused_observe_fake_quantize_with_mask));
  m.impl("learnable_fake_quantize", TORCH_BOX(&learnable_fake_quantize));
  m.impl("learnable_fake_quantize_backward", TORCH_BOX(&learnable_fake_quantize_backward));
}

}  // namespace fastquant
