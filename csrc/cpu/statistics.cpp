// Min/max and histograms.
#include "statistics.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>

#include "../math/histogram.h"

namespace fastquant {
namespace {

// ---------------------------------------------------------------------------- min/max

// One tensor's extremes, one entry a channel; low > high where a channel had nothing.
template <class T>
struct Extremes {
  explicit Extremes(int64_t channels)
      : low(channels, std::numeric_limits<T>::infinity()),
        high(channels, -std::numeric_limits<T>::infinity()) {}

  void fold(int64_t channel, T lo, T hi) {
    low[channel] = std::min(low[channel], lo);
    high[channel] = std::max(high[channel], hi);
  }

  std::vector<T> low, high;
};

// Rows at least this long are walked one by one; shorter ones as columns.
constexpr int64_t kShortRow = 512;

template <class S, class T>
bool extremes_of_rows(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax = kernels_of(S{}).minmax;
  const int64_t n = d.numel();
  const int64_t pieces = piece_count(n, kGrainOfReading);
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(d.channels));
  std::vector<char> nonfinite(pieces, 0);
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    for_segments(d, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      T lo, hi;
      bool odd;
      minmax(x + from, to - from, &lo, &hi, &odd);
      partial[piece].fold(channel, lo, hi);
      nonfinite[piece] |= odd;
    });
  });
  for (const auto& p : partial) {
    for (int64_t c = 0; c < d.channels; ++c) result->fold(c, p.low[c], p.high[c]);
  }
  return std::any_of(nonfinite.begin(), nonfinite.end(), [](char odd) { return odd != 0; });
}

// Folds extremes of the columns of [repeat, channels, inner] into those of the channels.
template <class T>
void fold_columns(const Extremes<T>& columns, int64_t repeat, const Dense& d, Extremes<T>* result) {
  const auto& kernels = kernels_of(T{});
  const int64_t width = d.channels * d.inner;
  bool odd;
  if (repeat > 1) {
    Extremes<T> once(width), unused(width);
    kernels.minmax_columns(columns.low.data(), repeat, width, width, once.low.data(), unused.high.data(), &odd);
    kernels.minmax_columns(columns.high.data(), repeat, width, width, unused.low.data(), once.high.data(),
                           &odd);
    fold_columns(once, 1, d, result);
    return;
  }
  for (int64_t c = 0; c < d.channels; ++c) {
    T low = columns.low[c], high = columns.high[c], other;
    if (d.inner > 1) {
      kernels.minmax(&columns.low[c * d.inner], d.inner, &low, &other, &odd);
      kernels.minmax(&columns.high[c * d.inner], d.inner, &other, &high, &odd);
    }
    result->fold(c, low, high);
  }
}

// Outer steps that are laid side by side, so that the columns of `width` fill whole vectors:
// several of them, or else one.
inline int64_t side_by_side(int64_t width) {
  constexpr int64_t kMost = 1024;
  for (const int64_t elements : {64, 16}) {
    const int64_t steps = elements / std::gcd(elements, width);
    if (steps * width <= kMost) return steps;
  }
  return 1;
}

// Short rows: every position of [channels, inner] is a column of its own.
template <class S, class T>
bool extremes_of_columns(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax_columns = kernels_of(S{}).minmax_columns;
  const int64_t width = d.channels * d.inner;
  const int64_t repeat = std::min(d.outer, side_by_side(width));
  const int64_t columns = width * repeat;
  const int64_t rows = d.outer / repeat;
  const int64_t pieces = std::min(piece_count(d.numel(), kGrainOfReading), std::max<int64_t>(rows, 1));
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(columns));
  std::vector<char> nonfinite(pieces, 0);
  for_pieces(rows, pieces, 1, [&](int64_t piece, int64_t begin, int64_t end) {
    bool odd = false;
    auto& p = partial[piece];
    minmax_columns(x + begin * columns, end - begin, columns, columns, p.low.data(), p.high.data(), &odd);
    nonfinite[piece] = odd;
  });
  bool odd = false;
  auto& first = partial[0];
  minmax_columns(x + rows * columns, 1, (d.outer - rows * repeat) * width, columns, first.low.data(),
                 first.high.data(), &odd);
  for (const auto& p : partial) fold_columns(p, repeat, d, result);
  return odd || std::any_of(nonfinite.begin(), nonfinite.end(), [](char o) { return o != 0; });
}

template <class S, class T>
bool extremes(const S* x, const Dense& d, Extremes<T>* result) {
  return d.outer == 1 || d.inner >= kShortRow ? extremes_of_rows(x, d, result)
                                              : extremes_of_columns(x, d, result);
}

// Called only where a tensor holds NaN or infinities. Returns how many.
template <class S, class T>
int64_t finite_extremes(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax_finite = kernels_of(S{}).minmax_finite;
  const int64_t n = d.numel();
  const int64_t pieces = piece_count(n);
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(d.channels));
  std::vector<int64_t> counts(pieces, 0);
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    for_segments(d, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      T lo, hi;
      int64_t count;
      minmax_finite(x + from, to - from, &lo, &hi, &count);
      partial[piece].fold(channel, lo, hi);
      counts[piece] += count;
    });
  });
  for (const auto& p : partial) {
    for (int64_t c = 0; c < d.channels; ++c) result->fold(c, p.low[c], p.high[c]);
  }
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  return total;
}

// torch's arithmetic: a NaN makes its channel's extremes NaN.
template <class S, class T>
void propagate_nan(const S* x, const Dense& d, Extremes<T>* result) {
  for_segments(d, 0, d.numel(), [&](int64_t channel, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (std::isnan(to_compute(x[i]))) {
        result->low[channel] = result->high[channel] = std::numeric_limits<T>::quiet_NaN();
        return;
      }
    }
  });
}

// Extremes under the policy; *left_out is how many elements took no part. Raises under
// NonFinite::raise.
template <class S, class T>
Extremes<T> observed_extremes(const S* x, const Dense& d, NonFinite policy, int64_t* left_out) {
  Extremes<T> result(d.channels);
  *left_out = 0;
  if (!extremes(x, d, &result)) return result;
  if (policy == NonFinite::propagate) {
    propagate_nan(x, d, &result);
    return result;
  }
  Extremes<T> finite(d.channels);
  *left_out = finite_extremes(x, d, &finite);
  if (policy == NonFinite::raise) throw NonfiniteElements(*left_out);
  return finite;
}

// ---------------------------------------------------------------------------- locking

// Several threads may observe with the same module, each without the GIL. What they read,
// change and write back in a buffer is one step for each; a few locks, chosen by address,
// serve all buffers. A forked child starts with all of them open, whoever held them.
using Locks = std::array<std::mutex, 64>;

Locks& locks() {
  static Locks* const all = [] {
    static Locks* const made = new Locks;
    pthread_atfork(nullptr, nullptr, [] { new (made) Locks; });
    return made;
  }();
  return *all;
}

std::unique_lock<std::mutex> locked(const Array& a) {
  const auto address = reinterpret_cast<uintptr_t>(a.data);
  return std::unique_lock<std::mutex>(locks()[(address >> 6) % std::tuple_size<Locks>::value]);
}

// Folds a tensor's extremes into the buffers, in the buffers' precision B.
template <class B, class T>
void update_buffers(const Extremes<T>& current, std::optional<double> averaging_constant, const Array& min_val,
                    const Array& max_val) {
  const B constant = static_cast<B>(averaging_constant.value_or(0.0));
  std::vector<B> lows = read_values<B>(min_val), highs = read_values<B>(max_val);
  for (size_t c = 0; c < lows.size(); ++c) {
    if (current.low[c] > current.high[c]) continue;
    const B low = static_cast<B>(rounded_to(min_val.type, current.low[c]));
    const B high = static_cast<B>(rounded_to(max_val.type, current.high[c]));
    const auto moved = folded<B>({lows[c], highs[c]}, {low, high}, averaging_constant.has_value(), constant);
    lows[c] = moved.low;
    highs[c] = moved.high;
  }
  write_values(min_val, lows);
  write_values(max_val, highs);
}

void add_nonfinite(const Array& nonfinite_count, int64_t left_out) {
  if (left_out > 0) write_value(nonfinite_count, read_value<int64_t>(nonfinite_count) + left_out);
}

// -------------------------------------------------------------------------- histogram

// Whole numbers, exact up to 2^53.
using Counts = std::vector<double>;

template <class S>
void count_wide(const S* x, int64_t n, const HistogramRange& r, int64_t bins, Counts* counts) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bin = wide_bin(static_cast<double>(to_compute(x[i])), r, bins);
    if (bin >= 0) ++(*counts)[bin];
  }
}

// Counts one thread's share of a tensor.
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

  // Whether an element was outside of the range, or NaN.
  bool left_out() const { return left_out_; }

  Counts totals() {
    drain();
    return std::move(totals_);
  }

 private:
  static constexpr int64_t kSmall = 4096;  // below it, summing four tables costs more than it saves
  static constexpr int64_t kCounterMax = int64_t{1} << 30;  // elements whose count is an int32_t

  int64_t entries_left_out() const {
    int64_t sum = 0;
    for (int t = 0; t < tables_; ++t) sum += scratch_[t * histogram_stride(bins_) + bins_];
    return sum;
  }

  void drain() {
    totals_.resize(bins_);
    const int64_t stride = histogram_stride(bins_);
    const uint32_t* const c = scratch_.data();
    // Conversions from int32_t are the only ones that every processor has vectors of.
    if (tables_ == 1) {
      for (int64_t b = 0; b < bins_; ++b) totals_[b] += static_cast<int32_t>(c[b]);
    } else {
      for (int64_t b = 0; b < bins_; ++b) {
        totals_[b] += static_cast<int32_t>(c[b] + c[b + stride] + c[b + 2 * stride] + c[b + 3 * stride]);
      }
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

// Whether the ends of a range are numbers of type T, so that comparing in T says what is inside.
template <class T>
bool is_exact(const HistogramRange& r) {
  return static_cast<double>(static_cast<T>(r.low)) == r.low &&
         static_cast<double>(static_cast<T>(r.high)) == r.high;
}

// Counts into a range that earlier tensors had. False, and the counts are of no use, where an element
// is outside of it; that is noticed at the end of a block.
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

// x with finite numbers beyond `most` put in at it.
template <class S>
std::vector<S> saturated(const S* x, int64_t n, double most) {
  std::vector<S> result(x, x + n);
  for (S& element : result) from_compute(&element, kept_finite(to_compute(element), most));
  return result;
}

template <class B>
std::vector<double> resample(const std::vector<double>& histogram, const HistogramRange& from,
                             const HistogramRange& to, int64_t upsample_rate) {
  const int64_t bins = static_cast<int64_t>(histogram.size());
  const Resampling<B> resampling(from, to, bins, upsample_rate);
  std::vector<double> result(bins), share(bins);
  for (int64_t bin = 0; bin < bins; ++bin) share[bin] = histogram[bin] / static_cast<double>(upsample_rate);
  // Resampling::sum for each bin, without its divisions.
  int64_t part = 0, old = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const int64_t last = resampling.parts_before(bin + 1);
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

// Rounds after each time, as observing so often would.
void add_counts(const Array& histogram, const Counts& counts, int64_t times) {
  with_buffer_type(histogram.type, [&](auto element) {
    auto* const data = static_cast<decltype(element)*>(histogram.data);
    for (int64_t t = 0; t < times; ++t) {
      for (size_t b = 0; b < counts.size(); ++b)
        assign(data + b, static_cast<double>(number(data[b])) + counts[b]);
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
  // Mostly a tensor brings nothing beyond the range so far, and then one walk over it is enough.
  if (!first && bin_formula_fits<T>(old, bins) && is_exact<T>(old) &&
      count_into_known_range(x, d.numel(), old, bins, &counts)) {
    add_counts(histogram, counts, times);
    return;
  }
  Extremes<T> range(1);
  const bool nonfinite = extremes(x, d, &range);
  int64_t left_out = 0;
  // Infinities never enter a histogram, whatever the policy; NaN raises where torch's would.
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
      counts = count_bins(saturated(x, d.numel(), most).data(), d.numel(), counting_range<T>(now), bins);
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
  // torch.ao has no such count: an element that was left out is one, however often it would be seen.
  if (policy == NonFinite::ignore) add_nonfinite(nonfinite_count, left_out);
}

}  // namespace

void observe_minmax(const Dense& x, const Array& min_val, const Array& max_val, const Array& nonfinite_count,
                    std::optional<double> averaging_constant, NonFinite policy) {
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    if (x.numel() == 0) return;
    check_count(min_val, x.channels);
    check_count(max_val, x.channels);
    int64_t left_out;
    const auto current = observed_extremes<S, Compute<S>>(static_cast<const S*>(x.data), x, policy, &left_out);
    const auto lock = locked(min_val);
    if (min_val.type == Element::f64) {
      update_buffers<double>(current, averaging_constant, min_val, max_val);
    } else {
      update_buffers<float>(current, averaging_constant, min_val, max_val);
    }
    add_nonfinite(nonfinite_count, left_out);
  });
}

void observe_histogram(const Dense& x, const Array& histogram, const Array& min_val, const Array& max_val,
                       const Array& nonfinite_count, int64_t upsample_rate, NonFinite policy, int64_t times) {
  check_count(min_val, 1);
  check_count(max_val, 1);
  check(histogram.numel > 0 && upsample_rate > 0, "a histogram needs bins");
  check(times > 0, "times must be positive, and is ", times);
  for (const Array* a : {&histogram, &min_val, &max_val}) {
    // Counts stall in anything narrower, at 256 in bf16.
    check(a->type == Element::f32 || a->type == Element::f64, a->name, " must be float32 or float64");
  }
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
