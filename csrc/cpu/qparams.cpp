// From statistics to quantization parameters.
#include "statistics.h"

namespace fastquant {
namespace {

template <class B>
bool observed(B low, B high) {
  return !(low == std::numeric_limits<B>::infinity() && high == -std::numeric_limits<B>::infinity());
}

template <class B>
struct ScaleAndZeroPoint {
  B scale;
  double zero_point;  // of any quantized dtype, 32 bits wide too
};

// (high - low) / levels, also where high - low is beyond the largest number.
template <class B>
B step(B low, B high, B levels) {
  const B span = high - low;
  return std::isinf(span) ? high / levels - low / levels : span / levels;
}

// The formulas, and their order of rounding, are those of torch.ao's
// UniformQuantizationObserverBase._calculate_qparams.
template <class B>
ScaleAndZeroPoint<B> qparams_of(B low, B high, B eps, const QParamsConfig& c) {
  if (!observed(low, high)) return {B{1}, 0};
  const B levels = static_cast<B>(c.quant_max - c.quant_min);
  if (c.scheme == Scheme::float_qparams) {
    B scale = step(low, high, levels);
    if (!(scale > eps)) scale = B{1};
    return {scale, static_cast<double>(-low / scale)};
  }
  const B negative = std::min(low, B{0}), positive = std::max(high, B{0});
  if (c.scheme == Scheme::symmetric) {
    const B scale =
        std::max(-negative, positive) / static_cast<B>(static_cast<double>(c.quant_max - c.quant_min) / 2);
    return {std::max(scale, eps), static_cast<double>(c.symmetric_zero_point)};
  }
  const B scale = std::max(step(negative, positive, levels), eps);
  const double offset = std::nearbyint(static_cast<double>(negative / scale));
  const double lowest = static_cast<double>(c.quant_min), highest = static_cast<double>(c.quant_max);
  const double zero_point = std::isnan(offset) ? lowest : lowest - offset;
  return {scale, std::min(std::max(zero_point, lowest), highest)};
}

template <class B>
void choose_into(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                 const Array& scale, const Array& zero_point) {
  const B smallest = read_value<B>(eps);
  std::vector<B> lows = read_values<B>(min_val);
  const std::vector<B> highs = read_values<B>(max_val);
  std::vector<double> zero_points;
  zero_points.reserve(lows.size());
  for (size_t i = 0; i < lows.size(); ++i) {
    const auto q = qparams_of<B>(lows[i], highs[i], smallest, config);
    lows[i] = q.scale;
    zero_points.push_back(q.zero_point);
  }
  write_values(scale, lows);
  write_values(zero_point, zero_points);
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
void search_into(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                 const Array& new_min, const Array& new_max) {
  const int64_t bins = histogram.numel;
  const std::vector<float> counts = read_values<float>(histogram);
  const double low = read_value<double>(min_val), high = read_value<double>(max_val);
  double width = high / static_cast<double>(bins) - low / static_cast<double>(bins);
  const double span = high - low;
  if (std::isfinite(span)) width = span / static_cast<double>(bins);
  // The search only compares errors. A power of two changes none of their digits and keeps
  // their cubes within what float holds, whatever the range.
  int exponent = 0;
  const double scaled_width = std::frexp(width, &exponent);
  const BinRange best = search_bins(counts, scaled_width, static_cast<double>(levels));

  const B base = static_cast<B>(low);
  const B range = static_cast<B>(high) - base;
  const B bin = std::isfinite(range) ? range / static_cast<B>(bins) : static_cast<B>(width);
  const B upper = base + bin * static_cast<B>(best.end + 1);
  write_value(new_min, base + bin * static_cast<B>(best.start));
  write_value(new_max, std::isfinite(upper) ? upper : static_cast<B>(high));
}

}  // namespace

void choose_qparams(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                    const Array& scale, const Array& zero_point) {
  for (const Array* a : {&max_val, &scale, &zero_point}) check_count(*a, min_val.numel);
  if (min_val.type == Element::f64) {
    choose_into<double>(min_val, max_val, eps, config, scale, zero_point);
  } else {
    choose_into<float>(min_val, max_val, eps, config, scale, zero_point);
  }
}

void search_histogram_range(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                            const Array& new_min, const Array& new_max) {
  check_count(min_val, 1);
  check_count(max_val, 1);
  check(histogram.numel > 0 && levels > 0, "a histogram needs bins");
  if (min_val.type == Element::f64) {
    search_into<double>(histogram, min_val, max_val, levels, new_min, new_max);
  } else {
    search_into<float>(histogram, min_val, max_val, levels, new_min, new_max);
  }
}

}  // namespace fastquant
