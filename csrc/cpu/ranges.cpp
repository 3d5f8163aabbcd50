// Chooses ranges from histograms, and computes the error of quantizing to a range.
#include "ranges.h"

#include <memory>

#include "../math/search.h"
#include "../math/tails.h"
#include "range_of_least_error.h"

namespace fastquant {
namespace {

// ---------------------------------------------------------------------------- the search of torch.ao

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

// B is the precision of the range.
template <class B>
Range<B> searched_range(const std::vector<float>& counts, const HistogramRange& range, int64_t levels) {
  const int64_t bins = static_cast<int64_t>(counts.size());
  const BinRange best = search_bins(counts, width_for_search(range, bins), static_cast<double>(levels));
  return range_of_bins<B>(range, bins, best.start, best.end);
}

// --------------------------------------------------------------------------------------- methods

// The counts of one channel, of which there are some, over a range that is not a point.
struct Histogram {
  std::vector<double> counts;
  HistogramRange range;
  double width, total;

  Histogram(std::vector<double> of, const HistogramRange& over) : counts(std::move(of)), range(over) {
    width = range.high / static_cast<double>(bins()) - range.low / static_cast<double>(bins());
    total = 0;
    for (double count : counts) total += count;
  }

  int64_t bins() const { return static_cast<int64_t>(counts.size()); }

  double edge(int64_t i) const { return i == bins() ? range.high : range.low + width * static_cast<double>(i); }

  // How many bins lie below 0; not a whole number, and below 0 or above `bins` where 0 lies outside.
  double zero() const { return -range.low / width; }

  int64_t bin_of_zero() const {
    return static_cast<int64_t>(std::clamp(std::floor(zero()), 0.0, static_cast<double>(bins() - 1)));
  }
};

// One side of a histogram together with its memory.
class SideOfHistogram {
 public:
  // The bins that reach beyond 0 to the right, or those to the left, from 0 outwards.
  SideOfHistogram(const Histogram& h, bool right) {
    const double zero = h.zero(), bins = static_cast<double>(h.bins());
    const double first = std::clamp(right ? std::floor(zero) : std::ceil(zero), 0.0, bins);
    const auto edge = h.counts.begin() + static_cast<int64_t>(first);
    if (right) {
      counts_.assign(edge, h.counts.end());
    } else {
      counts_.assign(std::make_reverse_iterator(edge), h.counts.rend());
    }
    start_ = right ? first - zero : zero - first;
    tails_.resize(counts_.size() + 1);
    for (size_t i = counts_.size(); i-- > 0;) tails_[i] = extended(tails_[i + 1], 1, counts_[i]);
  }

  Side side() const { return {tails_.data(), counts_.data(), static_cast<int64_t>(counts_.size()), start_}; }

 private:
  std::vector<double> counts_;
  std::vector<Tail> tails_;
  double start_;
};

HistogramRange range_of_least_squared_error(const Histogram& h, const QParamsConfig& grid) {
  const SideOfHistogram left(h, false), right(h, true);
  const Range<double> whole = {std::min(h.range.low, 0.0), std::max(h.range.high, 0.0)};
  return range_of_least_error(left.side(), right.side(), whole, h.width, grid);
}

// The smallest and the largest value that are left if some values are left out at both ends.
HistogramRange range_without_ends(const Histogram& h, double left_out) {
  HistogramRange found = h.range;
  double below = 0;
  bool has_low = false;
  for (int64_t i = 0; i < h.bins(); ++i) {
    const double count = h.counts[i];
    const auto reached = [&](double wanted) {
      return h.edge(i) + (h.edge(i + 1) - h.edge(i)) * std::max(0.0, (wanted - below) / count);
    };
    if (count > 0 && !has_low && below + count >= left_out) {
      found.low = reached(left_out);
      has_low = true;
    }
    if (count > 0 && below + count >= h.total - left_out) {
      found.high = reached(h.total - left_out);
      break;
    }
    below += count;
  }
  return found;
}

// The range from -x to x that holds so many values.
HistogramRange symmetric_range_holding(const Histogram& h, double wanted) {
  const int64_t bins = h.bins();
  std::vector<double> below(bins + 1);
  for (int64_t i = 0; i < bins; ++i) below[i + 1] = below[i] + h.counts[i];
  const auto values_below = [&](double x) {
    const double position = (x - h.range.low) / h.width;
    const double bin = std::clamp(std::floor(position), 0.0, static_cast<double>(bins - 1));
    const auto i = static_cast<int64_t>(bin);
    return below[i] + h.counts[i] * std::clamp(position - bin, 0.0, 1.0);
  };
  const auto within = [&](double x) { return values_below(x) - values_below(-x); };
  // The count is linear between the edges and the edges mirrored. The neighbours of the wanted one are found
  // among each.
  double left = 0, right = std::max(-h.range.low, h.range.high);
  const int64_t zero = h.bin_of_zero();
  const auto narrow = [&](int64_t edges, const auto& distance) {
    const int64_t n = first_rise(edges, [&](int64_t k) { return within(distance(k)) >= wanted; });
    if (n < edges) right = std::min(right, distance(n));
    if (n > 0) left = std::max(left, distance(n - 1));
  };
  narrow(bins - zero, [&](int64_t k) { return std::abs(h.edge(zero + 1 + k)); });
  narrow(zero + 1, [&](int64_t k) { return std::abs(h.edge(zero - k)); });
  const double reached = within(left), here = within(right);
  const double share = here > reached ? std::max(0.0, (wanted - reached) / (here - reached)) : 1.0;
  const double reach = left + (right - left) * std::min(share, 1.0);
  return {-reach, reach};
}

HistogramRange range_of_percentile(const Histogram& h, const QParamsConfig& grid, double percentile) {
  const double kept = percentile / 100;
  if (kept == 1) return h.range;
  if (grid.scheme == Scheme::symmetric) return symmetric_range_holding(h, kept * h.total);
  return range_without_ends(h, (1 - kept) / 2 * h.total);
}

// --------------------------------------------------------------------------------------- entropy

// Constants of the method, as in python/fastquant/_native/reference/ranges.py, which defines it.
constexpr double kValuesPerLevel = 10, kSpike = 4, kSmoothing = 1e-4, kResolution = 1e-6, kRounding = 1e-12;

// The divergence, of any range of bins, of the values quantized to `levels` groups of bins from the values
// themselves. Of a range, the sums over its groups are needed, but those over most groups are shared with other
// ranges whose groups have the same size.
class Divergence {
 public:
  Divergence(const std::vector<double>& counts, int64_t levels)
      : counts_(counts),
        levels_(levels),
        log_of_smoothing_(std::log(kSmoothing)),
        mass_(counts.size() + 1),
        own_(counts.size() + 1),
        filled_(counts.size() + 1),
        log_sums_(counts.size() + 1),
        masses_(counts.size() + 1) {
    for (size_t b = 0; b < counts.size(); ++b) {
      mass_[b + 1] = mass_[b] + counts[b];
      own_[b + 1] = own_[b] + times_log(counts[b]);
      filled_[b + 1] = filled_[b] + (counts[b] != 0);
    }
  }

  // Of the bins [start, end), which are `levels` or more; infinite where there is nothing to compare.
  double of(int64_t start, int64_t end) {
    const int64_t size = (end - start) / levels_, last = start + size * (levels_ - 1), rest = last + size;
    const double total = mass_.back();
    if (total == 0) return infinity<double>();
    Sums q = inner(start + size, last, size);
    // Values beyond the range count at its ends. They may fill a bin that is empty otherwise.
    const double left = mass_[start], right = total - mass_[end];
    const bool has_rest = rest < end;
    add_group(start, start + size, mass_[start + size] - mass_[start], left, counts_[start] == 0, &q);
    add_group(last, rest, mass_[end] - mass_[last], has_rest ? 0 : right, counts_[end - 1] == 0, &q);
    // A level that keeps any values keeps one in each of its bins, at least.
    const double of_empty = kSmoothing * static_cast<double>(levels_);
    if (q.mass < (of_empty + 0.5) * static_cast<double>(size)) return infinity<double>();
    double empty = static_cast<double>(end - start - (filled_[end] - filled_[start]));
    if (left > 0 && counts_[start] == 0) --empty;
    if (right > 0 && counts_[end - 1] == 0) --empty;
    double of_p = own_[end] - own_[start];
    of_p += times_log(counts_[start] + left) - times_log(counts_[start]);
    of_p += times_log(counts_[end - 1] + right) - times_log(counts_[end - 1]);
    if (has_rest) {
      double values = mass_[end] - mass_[rest] + right;
      int64_t empty_of_rest = end - rest - (filled_[end] - filled_[rest]);
      if (right > 0 && counts_[end - 1] == 0) --empty_of_rest;
      values += kSmoothing * static_cast<double>(empty_of_rest);
      q.log_sum += values * log_of_smoothing_;
      q.mass += kSmoothing * static_cast<double>(end - rest);
    }
    const double p_total = total + kSmoothing * empty;
    return (of_p + kSmoothing * log_of_smoothing_ * empty - q.log_sum) / p_total - std::log(p_total) +
           std::log(q.mass);
  }

 private:
  // Sums over the bins of groups: of p log q, and of q.
  struct Sums {
    double log_sum, mass;
  };

  static double times_log(double x) { return x == 0 ? 0 : x * std::log(x); }

  // Adds the bins [begin, end), of which the last group also counts what is left: `inside` values are shared
  // out among the bins that are not empty. `beyond` values count at one end, where an empty bin may be filled
  // so.
  void add_group(int64_t begin, int64_t end, double inside, double beyond, bool end_is_empty,
                 Sums* sums) const {
    const int64_t size = end - begin;
    const int64_t filled = filled_[end] - filled_[begin] + (beyond > 0 && end_is_empty);
    const double own = mass_[end] - mass_[begin] + beyond;
    const double smoothed = own + kSmoothing * static_cast<double>(size - filled);
    const double each = filled > 0 ? std::floor(inside / static_cast<double>(filled)) : 0;
    sums->log_sum += smoothed * (each > 0 ? std::log(each) : log_of_smoothing_);
    sums->mass += (each > 0 ? each : kSmoothing) * static_cast<double>(size);
  }

  // The groups of `size` bins from start to end.
  Sums inner(int64_t start, int64_t end, int64_t size) {
    Sums sums = {0, 0};
    if (levels_ * levels_ < static_cast<int64_t>(counts_.size())) {
      for (int64_t b = start; b < end; b += size) {
        add_group(b, b + size, mass_[b + size] - mass_[b], 0, false, &sums);
      }
      return sums;
    }
    if (size != size_) sum_groups(size);
    return {log_sums_[start] - log_sums_[end], masses_[start] - masses_[end]};
  }

  // Sums over all groups that begin at b, b + size, and so on.
  void sum_groups(int64_t size) {
    size_ = size;
    const int64_t bins = static_cast<int64_t>(counts_.size());
    for (int64_t b = bins; b >= 0; --b) {
      Sums sums = {0, 0};
      if (b + size <= bins) {
        sums = {log_sums_[b + size], masses_[b + size]};
        add_group(b, b + size, mass_[b + size] - mass_[b], 0, false, &sums);
      }
      log_sums_[b] = sums.log_sum;
      masses_[b] = sums.mass;
    }
  }

  const std::vector<double>& counts_;
  int64_t levels_, size_ = 0;
  double log_of_smoothing_;
  std::vector<double> mass_, own_;
  std::vector<int64_t> filled_;
  std::vector<double> log_sums_, masses_;
};

std::vector<double> without_spike(const Histogram& h) {
  std::vector<double> counts = h.counts;
  if (!(h.range.low <= 0 && 0 <= h.range.high)) return counts;
  const int64_t zero = h.bin_of_zero();
  double beside = 0;
  if (zero > 0) beside = counts[zero - 1];
  if (zero + 1 < h.bins()) beside = std::max(beside, counts[zero + 1]);
  if (counts[zero] >= kSpike * beside) counts[zero] = beside;
  return counts;
}

HistogramRange range_of_least_divergence(const Histogram& h, const QParamsConfig& grid) {
  const int64_t levels = grid.quant_max - grid.quant_min + 1;
  if (h.total < kValuesPerLevel * static_cast<double>(levels)) return h.range;
  std::vector<double> counts = without_spike(h);
  int64_t zero = h.bin_of_zero(), shift = 0;
  if (grid.scheme == Scheme::symmetric) {
    // As many bins on both sides, so that groups are as wide as levels.
    const int64_t above = h.bins() - 1 - zero, longest = std::max(zero, above);
    shift = longest - zero;
    counts.insert(counts.begin(), shift, 0.0);
    counts.resize(2 * longest + 1);
    zero = longest;
  }
  const int64_t bins = static_cast<int64_t>(counts.size());
  Divergence divergence(counts, levels);
  double best = infinity<double>();
  HistogramRange found = h.range;
  for (int64_t reach = 0; reach <= std::max(zero, bins - 1 - zero); ++reach) {
    const int64_t start = std::max<int64_t>(zero - reach, 0), end = std::min(zero + reach + 1, bins);
    if (end - start < levels) continue;
    const double now = divergence.of(start, end);
    if (now < best * (1 - kResolution) - kRounding) {
      best = now;
      found = {std::max(h.range.low + h.width * static_cast<double>(start - shift), h.range.low),
               std::min(h.range.low + h.width * static_cast<double>(end - shift), h.range.high)};
    }
  }
  return found;
}

// ------------------------------------------------------------------------- values themselves

// One side of 0 of some values.
class SideOfValues {
 public:
  // The distances from 0, ascending.
  explicit SideOfValues(std::vector<double> sorted) : values_(std::move(sorted)), tails_(values_.size()) {
    const size_t n = values_.size();
    Tail tail = {0, 0, 0};
    for (size_t i = n; i-- > 0;) {
      if (i + 1 < n) tail = extended({tail.mass + 1, tail.first, tail.second}, values_[i + 1] - values_[i]);
      tails_[i] = tail;
    }
    if (n == 0 || !(values_.back() > 0)) return;
    // Where to look for a value: the first in each of so many equal parts.
    per_unit_ = static_cast<double>(n) / values_.back();
    if (!is_finite(per_unit_)) per_unit_ = 0;
    first_.resize(n + 2, n);
    for (size_t i = n; i-- > 0;) first_[part_of(values_[i])] = i;
    for (size_t part = n + 1; part-- > 0;) first_[part] = std::min(first_[part], first_[part + 1]);
  }

  // The tail at a distance from 0.
  Tail beyond(double distance) const {
    if (first_.empty() || !(distance < values_.back())) return {0, 0, 0};
    const size_t part = part_of(distance);
    const auto begin = values_.begin() + static_cast<int64_t>(first_[part]);
    const auto end = values_.begin() + static_cast<int64_t>(first_[part + 1]);
    const auto next = std::upper_bound(begin, end, distance);
    Tail tail = tails_[next - values_.begin()];
    ++tail.mass;
    return extended(tail, *next - distance);
  }

 private:
  size_t part_of(double distance) const { return static_cast<size_t>(distance * per_unit_); }

  std::vector<double> values_;
  std::vector<Tail> tails_;    // beyond each value, that value left out
  std::vector<size_t> first_;  // of each part
  double per_unit_ = 0;
};

template <class S>
HistogramRange range_of_values(std::vector<S> elements, const QParamsConfig& grid) {
  std::vector<Compute<S>> values;
  values.reserve(elements.size());
  for (const S& element : elements) {
    const auto value = to_compute(element);
    if (std::isfinite(value)) values.push_back(value);
  }
  if (values.empty()) return {infinity<double>(), -infinity<double>()};
  std::sort(values.begin(), values.end());
  const auto zero = std::lower_bound(values.begin(), values.end(), Compute<S>{0});
  std::vector<double> below(std::make_reverse_iterator(zero), values.rend());
  for (double& value : below) value = -value;
  const Range<double> whole = {std::min<double>(values.front(), 0), std::max<double>(values.back(), 0)};
  if (whole.low == whole.high) return whole;
  const double unit = std::max(-whole.low, whole.high);
  std::vector<double> above(zero, values.end());
  for (auto* side : {&below, &above}) {
    for (double& value : *side) value /= unit;
  }
  return range_of_least_error(SideOfValues(std::move(below)), SideOfValues(std::move(above)), whole, unit,
                              grid);
}

// -------------------------------------------------------------------------------- all of them

HistogramRange chosen_range(const Histogram& h, const RangeSettings& settings) {
  HistogramRange found = h.range;
  if (settings.method == RangeMethod::mse) found = range_of_least_squared_error(h, settings.grid);
  if (settings.method == RangeMethod::percentile) {
    found = range_of_percentile(h, settings.grid, settings.percentile);
  }
  if (settings.method == RangeMethod::entropy) found = range_of_least_divergence(h, settings.grid);
  // Where next to everything is 0, what is not lies in the bins next to it, at the nearest.
  if (found.low == 0 && found.high == 0) {
    found = {std::max(h.range.low, -h.width), std::min(h.range.high, h.width)};
  }
  return found;
}

std::vector<double> row_of(const Array& histogram, int64_t row, int64_t bins) {
  std::vector<double> counts(bins);
  with_element(histogram.type, [&](auto element) {
    const auto* const data = static_cast<const decltype(element)*>(histogram.data) + row * bins;
    for (int64_t b = 0; b < bins; ++b) counts[b] = static_cast<double>(number(data[b]));
  });
  return counts;
}

bool is_whole(const HistogramRange& r) { return is_finite(r.low) && is_finite(r.high) && r.low <= r.high; }

template <class B>
HistogramRange range_of_channel(std::vector<double> counts, const HistogramRange& whole,
                                const RangeSettings& settings) {
  if (!is_whole(whole)) return whole;
  HistogramRange found = whole;
  if (settings.method == RangeMethod::l2) {
    const std::vector<float> narrow(counts.begin(), counts.end());
    const auto searched = searched_range<B>(narrow, whole, settings.search_levels);
    found = {static_cast<double>(searched.low), static_cast<double>(searched.high)};
  } else if (whole.low < whole.high) {
    const Histogram h(std::move(counts), whole);
    if (h.total > 0) found = chosen_range(h, settings);
  }
  return {std::min(found.low, 0.0), std::max(found.high, 0.0)};
}

// The shape of a histogram of each channel: how many bins.
int64_t bins_of(const Array& histogram, const Array& min_val, const Array& max_val) {
  check_count(max_val, min_val.numel);
  check(min_val.numel > 0 && histogram.numel > 0 && histogram.numel % min_val.numel == 0,
        "histogram must have as many bins for each of ", min_val.numel, " channels, has ", histogram.numel,
        " elements");
  return histogram.numel / min_val.numel;
}

// Calls f(channel) for all channels, in parallel if there are many.
template <class F>
void for_channels(int64_t channels, int64_t bins, const F& f) {
  for_pieces(channels, std::min(channels, piece_count(channels * bins, 4096)), 1,
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t c = begin; c < end; ++c) f(c);
             });
}

}  // namespace

void search_histogram_range(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                            const Array& new_min, const Array& new_max) {
  check_count(min_val, 1);
  check_count(max_val, 1);
  check(histogram.numel > 0 && levels > 0, "a histogram needs bins");
  const std::vector<float> counts = read_values<float>(histogram);
  const HistogramRange range = {read_value<double>(min_val), read_value<double>(max_val)};
  const auto write = [&](auto found) {
    write_value(new_min, found.low);
    write_value(new_max, found.high);
  };
  if (min_val.type == Element::f64) {
    write(searched_range<double>(counts, range, levels));
  } else {
    write(searched_range<float>(counts, range, levels));
  }
}

void histogram_range(const Array& histogram, const Array& min_val, const Array& max_val,
                     const RangeSettings& settings, const Array& new_min, const Array& new_max) {
  const int64_t bins = bins_of(histogram, min_val, max_val);
  check(settings.grid.quant_min < settings.grid.quant_max, "quant_min must be less than quant_max");
  std::vector<double> lows = read_values<double>(min_val), highs = read_values<double>(max_val);
  for_channels(min_val.numel, bins, [&](int64_t c) {
    const auto of_channel = min_val.type == Element::f64 ? &range_of_channel<double> : &range_of_channel<float>;
    const HistogramRange found = of_channel(row_of(histogram, c, bins), {lows[c], highs[c]}, settings);
    lows[c] = found.low;
    highs[c] = found.high;
  });
  write_values(new_min, lows);
  write_values(new_max, highs);
}

void least_error_range(const Dense& x, const QParamsConfig& grid, const Array& new_min, const Array& new_max) {
  check_count(new_min, x.channels);
  check_count(new_max, x.channels);
  check(grid.quant_min < grid.quant_max, "quant_min must be less than quant_max");
  std::vector<double> lows(x.channels), highs(x.channels);
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    for_channels(x.channels, x.outer * x.inner, [&](int64_t c) {
      const auto found = range_of_values(elements_of_channel(static_cast<const S*>(x.data), x, c), grid);
      lows[c] = found.low;
      highs[c] = found.high;
    });
  });
  write_values(new_min, lows);
  write_values(new_max, highs);
}

void histogram_error(const Array& histogram, const Array& min_val, const Array& max_val, const Array& scale,
                     const Array& zero_point, int64_t quant_min, int64_t quant_max, const Array& error) {
  const int64_t bins = bins_of(histogram, min_val, max_val);
  for (const Array* a : {&scale, &zero_point, &error}) check_count(*a, min_val.numel);
  const std::vector<double> lows = read_values<double>(min_val), highs = read_values<double>(max_val);
  const std::vector<double> scales = read_values<double>(scale), zeros = read_values<double>(zero_point);
  std::vector<double> errors(min_val.numel);
  for_channels(min_val.numel, bins, [&](int64_t c) {
    const double below = static_cast<double>(quant_min) - zeros[c];
    const double above = static_cast<double>(quant_max) - zeros[c], s = scales[c];
    const auto level_of = [&](double x) { return std::clamp(std::nearbyint(x / s), below, above); };
    const HistogramRange range = {lows[c], highs[c]};
    const Histogram h(row_of(histogram, c, bins), range);
    if (!(h.total > 0 && is_whole(range))) {
      errors[c] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    if (range.low == range.high) {
      const double off = range.low - level_of(range.low) * s;
      errors[c] = off * off;
      return;
    }
    // The integral of the squared error from 0 to x: each whole level contributes s³ / 12, and the last one
    // (x - its value)³ / 3.
    const auto error_below = [&](double x) {
      const double level = level_of(x), off = x - level * s;
      return level * (s * s * s / 12) + off * off * off / 3;
    };
    double sum = 0, before = error_below(h.edge(0));
    for (int64_t b = 0; b < bins; ++b) {
      const double now = error_below(h.edge(b + 1));
      sum += h.counts[b] * (now - before);
      before = now;
    }
    errors[c] = sum / (h.width * h.total);
  });
  write_values(error, errors);
}

}  // namespace fastquant
