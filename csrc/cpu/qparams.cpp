// From statistics to quantization parameters: choose_qparams, search_histogram_range.
#include <tuple>

#include "observe.h"

namespace fastquant {
namespace {

template <class B>
bool observed(B low, B high) {
  return !(low == std::numeric_limits<B>::infinity() && high == -std::numeric_limits<B>::infinity());
}

template <class B>
struct ScaleAndZeroPoint {
  B scale;
  B zero_point;
};

// The formulas, and their order of rounding, are those of torch.ao's
// UniformQuantizationObserverBase._calculate_qparams.
template <class B>
ScaleAndZeroPoint<B> qparams_of(B low, B high, B eps, const QParamsConfig& c) {
  if (!observed(low, high)) return {B{1}, B{0}};
  const B levels = static_cast<B>(c.quant_max - c.quant_min);
  if (c.scheme == Scheme::float_qparams) {
    B scale = (high - low) / levels;
    if (!(scale > eps)) scale = B{1};
    return {scale, -low / scale};
  }
  const B negative = std::min(low, B{0}), positive = std::max(high, B{0});
  if (c.scheme == Scheme::symmetric) {
    const B scale = std::max(-negative, positive) / static_cast<B>(static_cast<double>(c.quant_max - c.quant_min) / 2);
    return {std::max(scale, eps), static_cast<B>(c.symmetric_zero_point)};
  }
  const B scale = std::max((positive - negative) / levels, eps);
  const double offset = std::nearbyint(static_cast<double>(negative / scale));
  const double zero_point = static_cast<double>(c.quant_min) - offset;
  return {scale, static_cast<B>(std::min(std::max(zero_point, static_cast<double>(c.quant_min)),
                                         static_cast<double>(c.quant_max)))};
}

template <class B>
void choose_into(const Tensor& min_val, const Tensor& max_val, const Tensor& eps, const QParamsConfig& config,
                 Tensor& scale, Tensor& zero_point) {
  const B smallest = read_value<B>(eps);
  std::vector<B> lows = read_values<B>(min_val), highs = read_values<B>(max_val);
  for (size_t i = 0; i < lows.size(); ++i) {
    const auto q = qparams_of<B>(lows[i], highs[i], smallest, config);
    lows[i] = q.scale;
    highs[i] = q.zero_point;
  }
  write_values(scale, lows);
  write_values(zero_point, highs);
}

std::tuple<Tensor, Tensor> choose_qparams(const Tensor min_val, const Tensor max_val, const Tensor eps,
                                          int64_t quant_min, int64_t quant_max, int64_t scheme,
                                          int64_t symmetric_zero_point) {
  const QParamsConfig config = {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point};
  const int64_t count = min_val.numel();
  Tensor scale = empty_1d(count, min_val.scalar_type());
  const ScalarType type = config.scheme == Scheme::affine      ? ScalarType::Int
                          : config.scheme == Scheme::symmetric ? ScalarType::Long
                                                               : min_val.scalar_type();
  Tensor zero_point = empty_1d(count, type);
  choose_qparams_into(min_val, max_val, eps, config, scale, zero_point);
  return {scale, zero_point};
}

// The bins that hold the best range: a walk from both ends of the histogram, one quantile
// step at a time, until the quantization error grows. The walk, and the precision of each
// comparison, are those of torch.ao's HistogramObserver._non_linear_param_search (after
// caffe2's NormMinimization::NonlinearQuantizationParamsSearch).
struct BinRange {
  int64_t start, end;
};

BinRange search_bins(const std::vector<float>& histogram, double bin_width, double levels) {
  const int64_t bins = static_cast<int64_t>(histogram.size());
  std::vector<float> cumulative(bins), scratch(bins);
  double running = 0;
  for (int64_t b = 0; b < bins; ++b) {
    running += static_cast<double>(histogram[b]);
    cumulative[b] = static_cast<float>(running);
  }
  const double total = static_cast<double>(static_cast<float>(running));
  const auto error = kernels().quantization_error;

  constexpr double kStep = 1e-5;
  double alpha = 0.0, beta = 1.0;
  int64_t start = 0, end = bins - 1;
  double smallest_error = std::numeric_limits<double>::infinity();
  while (alpha < beta) {
    const double next_alpha = alpha + kStep, next_beta = beta - kStep;
    const float lower = static_cast<float>(next_alpha * total), upper = static_cast<float>(next_beta * total);
    int64_t left = start, right = end;
    while (left < end && cumulative[left] < lower) ++left;
    while (right > start && cumulative[right] > upper) --right;
    int64_t next_start = start, next_end = end;
    if (left - start > end - right) {
      next_start = left;
      alpha = next_alpha;
    } else {
      next_end = right;
      beta = next_beta;
    }
    if (next_start == start && next_end == end) continue;
    const double e = error(histogram.data(), bins, bin_width, next_start, next_end, levels, scratch.data());
    if (e > smallest_error) break;
    smallest_error = e;
    start = next_start;
    end = next_end;
  }
  return {start, end};
}

template <class B>
void search_into(const Tensor& histogram, const Tensor& min_val, const Tensor& max_val, int64_t dst_nbins,
                 Tensor& new_min, Tensor& new_max) {
  const int64_t bins = histogram.numel();
  const std::vector<float> counts = read_values<float>(histogram);
  const double low = read_value<double>(min_val), high = read_value<double>(max_val);
  double width = high / static_cast<double>(bins) - low / static_cast<double>(bins);
  const double span = high - low;
  if (std::isfinite(span)) width = span / static_cast<double>(bins);
  // Errors grow with the square of the width and the search only compares them: a width
  // whose cube float cannot hold is as good as one.
  const bool safe = width > 1e-9 && width < 1e7;
  const BinRange best = search_bins(counts, safe ? width : 1.0, static_cast<double>(dst_nbins));

  const B base = static_cast<B>(low);
  const B range = static_cast<B>(high) - base;
  const B bin = std::isfinite(range) ? range / static_cast<B>(bins) : static_cast<B>(width);
  const B upper = base + bin * static_cast<B>(best.end + 1);
  write_value(new_min, base + bin * static_cast<B>(best.start));
  write_value(new_max, std::isfinite(upper) ? upper : static_cast<B>(high));
}

std::tuple<Tensor, Tensor> search_histogram_range(const Tensor histogram, const Tensor min_val,
                                                  const Tensor max_val, int64_t dst_nbins) {
  check_buffer(histogram, histogram.numel(), "histogram");
  check_buffer(min_val, 1, "min_val");
  check_buffer(max_val, 1, "max_val");
  STD_TORCH_CHECK(histogram.numel() > 0 && dst_nbins > 0, "fastquant: histogram needs bins");
  Tensor new_min = empty_as(min_val), new_max = empty_as(max_val);
  if (is_double(min_val)) {
    search_into<double>(histogram, min_val, max_val, dst_nbins, new_min, new_max);
  } else {
    search_into<float>(histogram, min_val, max_val, dst_nbins, new_min, new_max);
  }
  return {new_min, new_max};
}

}  // namespace

void choose_qparams_into(const Tensor& min_val, const Tensor& max_val, const Tensor& eps,
                         const QParamsConfig& config, Tensor& scale, Tensor& zero_point) {
  const int64_t count = min_val.numel();
  check_buffer(min_val, count, "min_val");
  check_buffer(max_val, count, "max_val");
  check_buffer(scale, count, "scale");
  check_buffer(zero_point, count, "zero_point");
  check_buffer(eps, 1, "eps");
  if (is_double(min_val)) {
    choose_into<double>(min_val, max_val, eps, config, scale, zero_point);
  } else {
    choose_into<float>(min_val, max_val, eps, config, scale, zero_point);
  }
}

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams));
  m.impl("search_histogram_range", TORCH_BOX(&search_histogram_range));
}

}  // namespace fastquant
