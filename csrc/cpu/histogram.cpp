// Observing a histogram.
#include "../math/histogram.h"

#include <atomic>
#include <utility>

#include "extremes.h"
#include "locks.h"
#include "statistics.h"

namespace fastquant {
namespace {

// Counts of elements; double is exact up to 2^53.
using Counts = std::vector<double>;

template <class S>
void count_wide(const S* x, int64_t n, const HistogramRange& r, int64_t bins, Counts* counts) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bin = wide_bin(static_cast<double>(to_compute(x[i])), r, bins);
    if (bin >= 0) ++(*counts)[bin];
  }
}

// Counts the elements of the piece of a tensor that one thread processes.
template <class S>
class Counter {
 public:
  Counter(const HistogramRange& range, int64_t bins, int64_t expected)
      : range_(range),
        bins_(bins),
        tables_(expected < kSmall ? 1 : 4),
        scratch_(histogram_stride(bins) * tables_) {}

  void add(const S* x, int64_t n) {
    using T = Compute<S>;
    const auto histogram = kernels_of(S{}).histogram;
    while (n > 0) {
      const int64_t length = std::min(n, kCounterMax - counted_);
      histogram(x, length, static_cast<T>(range_.low), static_cast<T>(range_.high), bins_, scratch_.data(),
                tables_);
      left_out_ |= entries_left_out() > 0;
      x += length;
      n -= length;
      counted_ += length;
      if (counted_ == kCounterMax) {
        drain();
        std::fill(scratch_.begin(), scratch_.end(), 0u);
        counted_ = 0;
      }
    }
  }

  // Whether any element so far was outside the range or NaN.
  bool left_out() const { return left_out_; }

  Counts totals() {
    drain();
    return std::move(totals_);
  }

 private:
  static constexpr int64_t kSmall = 4096;  // with fewer elements, summing four tables costs more than it saves
  static constexpr int64_t kCounterMax = int64_t{1}
                                         << 30;  // after so many elements, every count fits an int32_t

  int64_t entries_left_out() const {
    int64_t sum = 0;
    for (int t = 0; t < tables_; ++t) sum += scratch_[t * histogram_stride(bins_) + bins_];
    return sum;
  }

  void drain() {
    const int64_t stride = histogram_stride(bins_);
    // As int32_t, because only its conversion to double has a vector instruction on every processor.
    int32_t* const c = reinterpret_cast<int32_t*>(scratch_.data());
    if (tables_ > 1) {
      for (int64_t b = 0; b < bins_; ++b) c[b] += c[b + stride] + c[b + 2 * stride] + c[b + 3 * stride];
    }
    if (totals_.empty()) {
      totals_.assign(c, c + bins_);
    } else {
      for (int64_t b = 0; b < bins_; ++b) totals_[b] += c[b];
    }
  }

  HistogramRange range_;
  int64_t bins_;
  int tables_;
  std::vector<uint32_t> scratch_;
  Counts totals_;
  int64_t counted_ = 0;
  bool left_out_ = false;
};

Counts summed(std::vector<Counts> parts) {
  Counts sum = std::move(parts.front());
  for (size_t p = 1; p < parts.size(); ++p) {
    for (size_t b = 0; b < sum.size(); ++b) sum[b] += parts[p][b];
  }
  return sum;
}

template <class S>
Counts count_bins(const S* x, int64_t n, const HistogramRange& r, int64_t bins) {
  if (!bin_formula_fits<Compute<S>>(r, bins)) {
    Counts counts(bins, 0.0);
    count_wide(x, n, r, bins, &counts);
    return counts;
  }
  const int64_t pieces = piece_count(n);
  std::vector<Counts> partial(pieces);
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    Counter<S> counter(r, bins, end - begin);
    counter.add(x + begin, end - begin);
    partial[piece] = counter.totals();
  });
  return summed(std::move(partial));
}

// Whether T can represent both ends of a range exactly, so that comparing elements with them in T is exact.
template <class T>
bool is_exact(const HistogramRange& r) {
  return static_cast<double>(static_cast<T>(r.low)) == r.low &&
         static_cast<double>(static_cast<T>(r.high)) == r.high;
}

// Counts the elements in the bins of the histogram's present range. Returns false as soon as a block has an
// element outside that range; the counts are then incomplete.
template <class S>
bool count_into_known_range(const S* x, int64_t n, const HistogramRange& known, int64_t bins, Counts* counts) {
  constexpr int64_t kBlock = 8192;
  const int64_t pieces = piece_count(n);
  std::vector<Counts> partial(pieces);
  std::atomic<bool> outside{false};
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    Counter<S> counter(known, bins, end - begin);
    for (int64_t i = begin; i < end && !outside.load(std::memory_order_relaxed); i += kBlock) {
      counter.add(x + i, std::min(kBlock, end - i));
      if (counter.left_out()) outside.store(true, std::memory_order_relaxed);
    }
    partial[piece] = counter.totals();
  });
  *counts = summed(std::move(partial));
  return !outside;
}

// A copy of x with finite elements clamped to [-most, most].
template <class S>
std::vector<S> limited(const S* x, int64_t n, double most) {
  std::vector<S> result(x, x + n);
  for (S& element : result) from_compute(&element, kept_finite(to_compute(element), most));
  return result;
}

template <class B>
std::vector<double> resample(const std::vector<double>& histogram, const HistogramRange& from,
                             const HistogramRange& to, int64_t upsample_rate) {
  const int64_t bins = static_cast<int64_t>(histogram.size());
  std::vector<int64_t> parts_before(bins);
  kernels_of(B{}).parts_before(from, to, bins, upsample_rate, parts_before.data());
  std::vector<double> result(bins), share(bins);
  for (int64_t bin = 0; bin < bins; ++bin) share[bin] = histogram[bin] / static_cast<double>(upsample_rate);
  // Computes Resampling::sum for all bins in one pass, which needs no divisions.
  int64_t part = 0, old = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const int64_t last = parts_before[bin];
    double total = 0;
    while (part < last) {
      const int64_t end_of_old = (old + 1) * upsample_rate, stop = std::min(end_of_old, last);
      total += share[old] * static_cast<double>(stop - part);
      part = stop;
      if (stop == end_of_old) ++old;
    }
    result[bin] = total;
  }
  return result;
}

std::vector<double> moved_histogram(const std::vector<double>& histogram, const HistogramRange& from,
                                    const HistogramRange& to, int64_t upsample_rate, bool in_double) {
  const int64_t bins = static_cast<int64_t>(histogram.size());
  if (from.low == from.high) {
    std::vector<double> result(bins, 0.0);
    const int64_t bin = bin_of_point(from.low, to, bins);
    if (bin >= 0) result[bin] = std::accumulate(histogram.begin(), histogram.end(), 0.0);
    return result;
  }
  return resamples_in_double(in_double, to, bins) ? resample<double>(histogram, from, to, upsample_rate)
                                                  : resample<float>(histogram, from, to, upsample_rate);
}

// Adds the counts `times` times, rounding to the histogram's type after each, as repeated observations would.
void add_counts(const Array& histogram, const Counts& counts, int64_t times) {
  with_element(histogram.type, [&](auto element) {
    auto* const data = static_cast<decltype(element)*>(histogram.data);
    const auto* const more = counts.data();
    const size_t bins = counts.size();
    for (int64_t t = 0; t < times; ++t) {
      for (size_t b = 0; b < bins; ++b) assign(data + b, static_cast<double>(number(data[b])) + more[b]);
    }
  });
}

template <class S>
void observe_histogram_of(const S* x, const Dense& d, const Array& histogram, const Array& min_val,
                          const Array& max_val, const Array& nonfinite_count, int64_t upsample_rate,
                          NonFinite policy, int64_t times) {
  using T = Compute<S>;
  const int64_t bins = histogram.numel;
  const HistogramRange old = {read_value<double>(min_val), read_value<double>(max_val)};
  const bool first = is_unused(old);
  Counts counts;
  // Most tensors do not extend the histogram's range; for these, one pass over x is enough.
  if (!first && bin_formula_fits<T>(old, bins) && is_exact<T>(old) &&
      count_into_known_range(x, d.numel(), old, bins, &counts)) {
    add_counts(histogram, counts, times);
    return;
  }
  Extremes<T> range(1);
  const bool nonfinite = extremes(x, d, &range);
  int64_t left_out = 0;
  // No policy lets infinities into a histogram. NaN raises an error if it is to be propagated, as in torch.
  if (nonfinite) {
    if (policy == NonFinite::propagate) {
      propagate_nan(x, d, &range);
      check(!std::isnan(range.low[0]), "x holds NaN, which has no place in a histogram");
    }
    range = Extremes<T>(1);
    left_out = finite_extremes(x, d, &range);
    if (policy == NonFinite::raise) throw NonfiniteElements(left_out);
  }
  if (range.low[0] <= range.high[0]) {
    const HistogramRange seen = {static_cast<double>(range.low[0]), static_cast<double>(range.high[0])};
    const double most = min_val.type == Element::f64 ? largest_of(double{}) : largest_of(float{});
    const HistogramRange held = {kept_finite(seen.low, most), kept_finite(seen.high, most)};
    const HistogramRange now = widened(old, held);
    if (held.low != seen.low || held.high != seen.high) {
      counts = count_bins(limited(x, d.numel(), most).data(), d.numel(), counting_range<T>(now), bins);
    } else {
      counts = count_bins(x, d.numel(), counting_range<T>(now), bins);
    }
    int64_t added = 0;
    if (first) {
      write_values(histogram, counts);
      added = 1;
    } else if (now.low != old.low || now.high != old.high) {
      const std::vector<double> before = read_values<double>(histogram);
      std::vector<double> total =
          moved_histogram(before, old, now, upsample_rate, histogram.type == Element::f64);
      for (int64_t b = 0; b < bins; ++b) total[b] += counts[b];
      write_values(histogram, total);
      added = 1;
    }
    add_counts(histogram, counts, times - added);
    write_value(min_val, now.low);
    write_value(max_val, now.high);
  }
  // Each element that was left out is counted once, whatever `times` is; torch.ao has no such count to match.
  if (policy == NonFinite::ignore) add_nonfinite(nonfinite_count, left_out);
}

// What histograms are kept in. In narrower types, adding 1 to a count soon has no effect: from 256 on in
// bfloat16.
void check_buffers(const Array& histogram, const Array& min_val, const Array& max_val, int64_t upsample_rate) {
  check(histogram.numel > 0 && upsample_rate > 0, "a histogram needs bins");
  for (const Array* a : {&histogram, &min_val, &max_val}) {
    check(a->type == Element::f32 || a->type == Element::f64, a->name, " must be float32 or float64");
  }
}

// `count` elements of a histogram's buffer, from an index on.
Array part_of(const Array& a, int64_t begin, int64_t count) {
  const int64_t size = a.type == Element::f64 ? sizeof(double) : sizeof(float);
  return {static_cast<char*>(a.data) + begin * size, a.type, count, a.name};
}

// Throws where the policy refuses any element of x, before any channel has been counted.
template <class S>
void require_accepted(const S* x, const Dense& d, NonFinite policy) {
  if (policy == NonFinite::ignore) return;
  const Dense whole = {d.data, d.type, 1, 1, d.numel()};
  int64_t left_out = 0;
  const auto range = observed_extremes<S, Compute<S>>(x, whole, policy, &left_out);
  check(!std::isnan(range.low[0]), "x holds NaN, which has no place in a histogram");
}

}  // namespace

void observe_channel_histograms(const Dense& x, const Array& histogram, const Array& min_val,
                                const Array& max_val, const Array& nonfinite_count, int64_t upsample_rate,
                                NonFinite policy) {
  check_count(min_val, x.channels);
  check_count(max_val, x.channels);
  if (x.numel() == 0) return;
  check_buffers(histogram, min_val, max_val, upsample_rate);
  check(histogram.numel % x.channels == 0, "histogram must have as many bins for each channel");
  const int64_t bins = histogram.numel / x.channels;
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    const S* const data = static_cast<const S*>(x.data);
    require_accepted(data, x, policy);
    const auto lock = locked(min_val);
    std::vector<int64_t> left_out(x.channels);
    for_pieces(x.channels, std::min(x.channels, piece_count(x.numel())), 1,
               [&](int64_t, int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   const std::vector<S> elements = elements_of_channel(data, x, c);
                   const Dense channel = {elements.data(), x.type, 1, 1, x.outer * x.inner};
                   const Array count = {&left_out[c], Element::i64, 1, "nonfinite_count"};
                   observe_histogram_of(elements.data(), channel, part_of(histogram, c * bins, bins),
                                        part_of(min_val, c, 1), part_of(max_val, c, 1), count, upsample_rate,
                                        policy, 1);
                 }
               });
    add_nonfinite(nonfinite_count, std::accumulate(left_out.begin(), left_out.end(), int64_t{0}));
  });
}

void observe_histogram(const Dense& x, const Array& histogram, const Array& min_val, const Array& max_val,
                       const Array& nonfinite_count, int64_t upsample_rate, NonFinite policy, int64_t times) {
  check_count(min_val, 1);
  check_count(max_val, 1);
  check_buffers(histogram, min_val, max_val, upsample_rate);
  check(times > 0, "times must be positive, and is ", times);
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    if (x.numel() == 0) return;
    const Dense whole = {x.data, x.type, 1, 1, x.numel()};
    const auto lock = locked(min_val);
    observe_histogram_of(static_cast<const S*>(x.data), whole, histogram, min_val, max_val, nonfinite_count,
                         upsample_rate, policy, times);
  });
}

}  // namespace fastquant
