// Computes quantization parameters from the statistics of observers.
#include <memory>

#include "../math/search.h"
#include "statistics.h"

namespace fastquant {
namespace {

template <class B>
void choose_into(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                 const Array& scale, const Array& zero_point) {
  const B smallest = read_value<B>(eps);
  const auto lows = read_values<B, FewOrMany<B>>(min_val), highs = read_values<B, FewOrMany<B>>(max_val);
  FewOrMany<B> scales(lows.size());
  FewOrMany<double> zero_points(lows.size());
  for (int64_t i = 0; i < lows.size(); ++i) {
    const auto q = qparams_of<B>({lows[i], highs[i]}, smallest, config);
    scales[i] = q.scale;
    zero_points[i] = q.zero_point;
  }
  write_values(scale, scales);
  write_values(zero_point, zero_points);
}

struct BinRange {
  int64_t start, end;
};

// Finds the range of bins with the smallest quantization error.
BinRange search_bins(const std::vector<float>& histogram, double bin_width, double levels) {
  const int64_t bins = static_cast<int64_t>(histogram.size());
  const std::unique_ptr<float[]> memory(new float[3 * bins]);
  float* const cumulative = memory.get();
  float* const density = cumulative + bins;
  float* const scratch = density + bins;
  const float width = static_cast<float>(bin_width);
  double running = 0;
  for (int64_t b = 0; b < bins; ++b) {
    running += static_cast<double>(histogram[b]);
    cumulative[b] = static_cast<float>(running);
    density[b] = histogram[b] / width;
  }
  const auto error = kernels().quantization_error;
  float chains[kSumChains];
  sum_chains<kSumChains>(histogram.data(), bins, 0, chains);
  RangeWalk walk(cumulative, sum_of_chains(chains, histogram.data(), bins), bins);
  while (walk.next() &&
         walk.take(error(density, bins, bin_width, walk.next_start(), walk.next_end(), levels, scratch))) {
  }
  return {walk.start(), walk.end()};
}

template <class B>
void search_into(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                 const Array& new_min, const Array& new_max) {
  const int64_t bins = histogram.numel;
  const std::vector<float> counts = read_values<float>(histogram);
  const HistogramRange range = {read_value<double>(min_val), read_value<double>(max_val)};
  const BinRange best = search_bins(counts, width_for_search(range, bins), static_cast<double>(levels));
  const auto found = range_of_bins<B>(range, bins, best.start, best.end);
  write_value(new_min, found.low);
  write_value(new_max, found.high);
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

void observe_qparams(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings) {
  const auto& [min_val, max_val, scale, zero_point, nonfinite_count, eps] = buffers;
  for (const Array* a : {&max_val, &scale, &zero_point}) check_count(*a, min_val.numel);
  observe_minmax(x, min_val, max_val, nonfinite_count, settings.averaging_constant, settings.nonfinite);
  choose_qparams(min_val, max_val, eps, settings.qparams, scale, zero_point);
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
