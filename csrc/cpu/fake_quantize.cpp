// Fake-quantize ops on plain memory, in parallel.
#include "fake_quantize.h"

#include "../math/qparams.h"
#include "quant_params.h"

namespace fastquant {
namespace {

// A row is `inner` contiguous elements of one channel. For rows of at least this length, a row's parameters are
// broadcast to vectors. For shorter rows, arrays hold the parameters of each of the channels * inner elements
// after which they repeat.
constexpr int64_t kShortRow = 32;

// Of a tensor with several channels. Owns the arrays that its QuantParams points to.
template <class T>
class ParamArrays {
 public:
  ParamArrays(const Dense& d, const Array& scale, const Array& zero_point, int64_t quant_min, int64_t quant_max)
      : periodic_(d.inner < kShortRow) {
    params_.quant_min = quant_min;
    params_.quant_max = quant_max;
    params_.channels = d.channels;
    params_.inner = std::max<int64_t>(d.inner, 1);
    params_.float_zero_point = is_floating(zero_point);
    params_.exact = false;
    // The arrays hold one value per channel or, if rows are short, one per element, repeated to fill the
    // padding.
    const int64_t each = periodic_ ? d.inner : 1, pattern = d.channels * each;
    params_.period = periodic_ ? pattern * ((kPeriodPadding + pattern - 1) / pattern) : 0;
    const int64_t length = periodic_ ? params_.period + kPeriodPadding : pattern;
    const T** const arrays[] = {&params_.scale, &params_.inverse_scale, &params_.zero_point, &params_.low,
                                &params_.high,  &params_.low_edge,      &params_.high_edge};
    constexpr int kArrays = static_cast<int>(sizeof arrays / sizeof *arrays);
    values_.resize(kArrays * length);
    for (int k = 0; k < kArrays; ++k) *arrays[k] = values_.data() + k * length;
    const std::vector<T> scales = read_values<T>(scale), zero_points = read_values<T>(zero_point);
    for (int64_t c = 0; c < d.channels; ++c) {
      const auto p = channel_params<T>(scales[c], scale.type == Element::f64, zero_points[c],
                                       params_.float_zero_point, quant_min, quant_max);
      const T of_channel[kArrays] = {p.scale, p.inverse_scale, p.zero_point, p.low,
                                     p.high,  p.low_edge,      p.high_edge};
      for (int k = 0; k < kArrays; ++k) std::fill_n(&values_[k * length + c * each], each, of_channel[k]);
      params_.exact |= p.exact;
    }
    for (int k = 0; k < kArrays; ++k) {
      for (int64_t i = k * length + pattern; i < (k + 1) * length; ++i) values_[i] = values_[i - pattern];
    }
  }

  const QuantParams<T>& get() const { return params_; }
  bool periodic() const { return periodic_; }

 private:
  bool periodic_;
  QuantParams<T> params_;
  std::vector<T> values_;
};

// A part of one channel that is summed by one thread. Neither the lengths of parts nor the order in which their
// sums are added depends on the number of threads, so the result does not either.
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

}  // namespace

void fake_quantize(const Dense& x, const Array& scale, const Array& zero_point, int64_t quant_min,
                   int64_t quant_max, void* y, uint64_t* mask) {
  check_count(scale, x.channels);
  check_count(zero_point, x.channels);
  if (x.numel() == 0) return;
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const auto quantize = [&](auto kernel, const QuantParams<T>& params) {
      const int64_t n = x.numel();
      for_pieces(n, piece_count(n), kMaskWord, [&](int64_t, int64_t first, int64_t last) {
        for_blocks_backwards(first, last, [&](int64_t begin, int64_t end) {
          kernel(static_cast<const S*>(x.data), static_cast<S*>(y), mask, begin, end, params);
        });
      });
    };
    const auto& table = kernels_of(S{});
    if (x.channels == 1) {
      const TensorParams<T> params(x.numel(), scale, zero_point, quant_min, quant_max);
      quantize(table.fake_quantize_rows, params.get());
    } else {
      const ParamArrays<T> params(x, scale, zero_point, quant_min, quant_max);
      quantize(params.periodic() ? table.fake_quantize_periodic : table.fake_quantize_rows, params.get());
    }
  });
}

void quantize_per_channel(const Dense& x, const Array& scale, int64_t quant_min, int64_t quant_max,
                          int8_t* out) {
  check_count(scale, x.channels);
  check(x.type == Element::f32, "x must be float32");
  check_int8_range(quant_min, quant_max);
  const int64_t n = x.numel();
  if (n == 0) return;
  const std::vector<float> scales = read_values<float>(scale);
  const float low = static_cast<float>(quant_min), high = static_cast<float>(quant_max);
  for_pieces(n, piece_count(n), 1, [&](int64_t, int64_t first, int64_t last) {
    for_segments(x, first, last, [&](int64_t channel, int64_t begin, int64_t end) {
      kernels().quantize(static_cast<const float*>(x.data) + begin, out + begin, end - begin,
                         1.0f / scales[channel], low, high);
    });
  });
}

void fill_mask(uint64_t* mask, int64_t numel) {
  std::fill(mask, mask + numel / kMaskWord, ~uint64_t{0});
  if (numel % kMaskWord != 0) mask[numel / kMaskWord] = (uint64_t{1} << (numel % kMaskWord)) - 1;
}

void mask_gradient(const Dense& grad, const uint64_t* mask, void* out) {
  with_stored_type(grad.type, [&](auto stored) {
    using S = decltype(stored);
    const int64_t n = grad.numel();
    for_pieces(n, piece_count(n), kMaskWord, [&](int64_t, int64_t begin, int64_t end) {
      kernels_of(S{}).mask_gradient(static_cast<const S*>(grad.data), mask, static_cast<S*>(out), begin, end);
    });
  });
}

std::vector<int64_t> whole_zero_points(const Array& zero_point, int64_t quant_min, int64_t quant_max) {
  std::vector<int64_t> whole;
  for (double z : read_values<double>(zero_point)) {
    whole.push_back(static_cast<int64_t>(rounded_zero_point(z, quant_min, quant_max)));
  }
  return whole;
}

void learnable_backward(const Dense& x, const void* grad, const Array& scale, const Array& zero_point,
                        int64_t quant_min, int64_t quant_max, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point) {
  check_count(scale, x.channels);
  check_count(zero_point, x.channels);
  const std::vector<Stretch> stretches = stretches_of(x);
  const int64_t count = static_cast<int64_t>(stretches.size());
  std::vector<LearnableSums> sums(count);
  const std::vector<double> scales = read_values<double>(scale);
  const std::vector<int64_t> zero_points = whole_zero_points(zero_point, quant_min, quant_max);
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const S* from = static_cast<const S*>(x.data);
    const S* g = static_cast<const S*>(grad);
    S* to = static_cast<S*>(grad_x);
    const int64_t pieces = std::min(piece_count(x.numel()), count);
    for_pieces(count, pieces, 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Stretch& s = stretches[i];
        const T scale_here = static_cast<T>(scales[s.channel]);
        sums[i] = kernels_of(S{}).learnable_backward(
            g + s.begin, from + s.begin, to + s.begin, s.end - s.begin, scale_here,
            reciprocal(scale_here, scale.type == Element::f64), static_cast<T>(zero_points[s.channel]),
            static_cast<T>(quant_min), static_cast<T>(quant_max), static_cast<T>(grad_factor));
      }
    });
  });
  std::vector<double> scale_totals(x.channels, 0.0), zero_point_totals(x.channels, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    scale_totals[stretches[i].channel] += sums[i].scale;
    zero_point_totals[stretches[i].channel] += sums[i].zero_point;
  }
  write_values(grad_scale, scale_totals);
  write_values(grad_zero_point, zero_point_totals);
}

}  // namespace fastquant
