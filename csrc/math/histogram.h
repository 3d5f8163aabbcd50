// Histograms: the range of the bins, the bin of a value, and counts resampled onto a wider range.
#pragma once

#include <cmath>

#include "range.h"

namespace fastquant {
namespace {

FASTQUANT_HD inline bool is_finite(double x) { return x - x == 0; }

// The bin is (x - low) * bins / (high - low), rounded after each operation as torch.histc
// does, so that counts are torch's to the last element. Needs low < high and a finite
// (high - low) * bins.
template <class V>
struct BinFormula {
  using Reg = typename V::Reg;
  using T = typename V::Element;
  Reg low, high, width, bins, last;

  FASTQUANT_HD static BinFormula of(T low, T high, int64_t bins) {
    return {V::set1(low), V::set1(high), V::set1(high - low), V::set1(static_cast<T>(bins)),
            V::set1(static_cast<T>(bins - 1))};
  }

  FASTQUANT_HD typename V::Mask inside(Reg x) const { return V::both(V::le(low, x), V::le(x, high)); }

  // The bin index before truncation. Valid only for values inside the range.
  FASTQUANT_HD Reg bin(Reg x) const { return V::min(V::div(V::mul(V::sub(x, low), bins), width), last); }
};

using HistogramRange = Range<double>;

// Whether a histogram has counted nothing yet.
FASTQUANT_HD inline bool is_unused(const HistogramRange& r) {
  return r.low == infinity<double>() || r.high == -infinity<double>();
}

FASTQUANT_HD inline HistogramRange widened(const HistogramRange& old, const HistogramRange& seen) {
  if (is_unused(old)) return seen;
  return {least(old.low, seen.low), greatest(old.high, seen.high)};
}

// torch.histc widens an empty range by one on each side.
template <class T>
FASTQUANT_HD HistogramRange counting_range(const HistogramRange& r) {
  const T low = static_cast<T>(r.low), high = static_cast<T>(r.high);
  if (low != high) return {static_cast<double>(low), static_cast<double>(high)};
  return {static_cast<double>(low - T{1}), static_cast<double>(high + T{1})};
}

template <class T>
FASTQUANT_HD bool arithmetic_fits(const HistogramRange& r, int64_t bins) {
  return is_finite(
      static_cast<double>((static_cast<T>(r.high) - static_cast<T>(r.low)) * static_cast<T>(bins)));
}

// Whether BinFormula applies to values of type T.
template <class T>
FASTQUANT_HD bool bin_formula_fits(const HistogramRange& r, int64_t bins) {
  return r.low < r.high && arithmetic_fits<T>(r, bins);
}

// The bin of a value, or -1 outside of the range, where BinFormula does not apply: for ranges too wide for
// the arithmetic of T, and for values so large that adding 1 does not change them.
FASTQUANT_HD inline int64_t wide_bin(double x, const HistogramRange& r, int64_t bins) {
  if (!(r.low <= x && x <= r.high)) return -1;
  const double half_span = r.high / 2 - r.low / 2;
  const double position = half_span > 0 ? (x / 2 - r.low / 2) / half_span : 0.5;
  const int64_t bin = static_cast<int64_t>(position * static_cast<double>(bins));
  return bin < bins ? bin : bins - 1;
}

// a * b + c, rounded once, as torch's vectorized linspace computes it in float. Double is used
// only for ranges on which torch fails, so there it may round twice.
FASTQUANT_HD inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTQUANT_HD inline double multiply_add(double a, double b, double c) { return a * b + c; }

// torch.linspace(start, end, count), but never descending where rounding would make it so.
template <class B>
struct Linspace {
  B start, end, step, before_half;
  int64_t count;

  FASTQUANT_HD Linspace(B from, B to, int64_t n)
      : start(from), end(to), step((to - from) / static_cast<B>(n - 1)), count(n) {
    before_half = multiply_add(step, static_cast<B>(count / 2 - 1), start);
  }

  FASTQUANT_HD B operator[](int64_t k) const {
    if (k < count / 2) return multiply_add(step, static_cast<B>(k), start);
    const B value = multiply_add(-step, static_cast<B>(count - k - 1), end);
    return value < before_half ? before_half : value;
  }
};

// A histogram on a wider range: each bin is cut into `rate` parts, and each part goes whole to
// the new bin that holds its middle. B is the precision in which torch finds the middles.
template <class B>
class Resampling {
 public:
  FASTQUANT_HD Resampling(const HistogramRange& from, const HistogramRange& to, int64_t bins, int64_t rate)
      : bins_(bins),
        rate_(rate),
        low_(static_cast<B>(from.low)),
        part_width_((static_cast<B>(from.high) - low_) / static_cast<B>(bins * rate)),
        starts_(low_, static_cast<B>(from.high), bins * rate + 1),
        edges_(static_cast<B>(to.low), static_cast<B>(to.high), bins + 1) {}

  // How many parts go to the new bins that come before this bin.
  FASTQUANT_HD int64_t parts_before(int64_t bin) const {
    const int64_t parts = bins_ * rate_;
    if (bin <= 0) return 0;
    if (bin >= bins_) return parts;
    const B edge = edges_[bin];
    // Estimate how many middles lie before the edge, then correct the estimate by the few steps that
    // rounding may have moved it. Where it cannot be used, search by bisection.
    const B guess = (edge - low_) / part_width_ + static_cast<B>(0.5);
    int64_t count = guess > 0 ? (guess < static_cast<B>(parts) ? static_cast<int64_t>(guess) : parts) : 0;
    for (int steps = 0; steps < 8; ++steps) {
      if (count > 0 && middle(count - 1) >= edge) {
        --count;
      } else if (count < parts && middle(count) < edge) {
        ++count;
      } else {
        return count;
      }
    }
    int64_t least_count = 0, most = parts;
    while (least_count < most) {
      const int64_t half = least_count + (most - least_count) / 2;
      if (middle(half) < edge) {
        least_count = half + 1;
      } else {
        most = half;
      }
    }
    return least_count;
  }

  // The counts of the parts [first, last). old(bin) gives the count of a whole old bin.
  template <class Old>
  FASTQUANT_HD double sum(int64_t first, int64_t last, const Old& old) const {
    double total = 0;
    for (int64_t part = first; part < last;) {
      const int64_t bin = part / rate_;
      const int64_t stop = (bin + 1) * rate_ < last ? (bin + 1) * rate_ : last;
      total += old(bin) / static_cast<double>(rate_) * static_cast<double>(stop - part);
      part = stop;
    }
    return total;
  }

 private:
  FASTQUANT_HD B middle(int64_t part) const { return starts_[part] + static_cast<B>(0.5) * part_width_; }

  int64_t bins_, rate_;
  B low_, part_width_;
  Linspace<B> starts_, edges_;
};

// Whether middles are computed in double: for a histogram in double, and where fp32 would overflow.
FASTQUANT_HD inline bool resamples_in_double(bool double_histogram, const HistogramRange& to, int64_t bins) {
  return double_histogram || !arithmetic_fits<float>(to, bins);
}

// The bin that receives all counts of a histogram that has seen only one value, so that its range is empty.
FASTQUANT_HD inline int64_t bin_of_point(double value, const HistogramRange& to, int64_t bins) {
  using T = float;
  const T x = static_cast<T>(value);
  const HistogramRange r = counting_range<double>(to);
  if (!bin_formula_fits<T>(r, bins)) return wide_bin(static_cast<double>(x), r, bins);
  const T low = static_cast<T>(r.low), high = static_cast<T>(r.high);
  if (!(low <= x && x <= high)) return -1;
  const T bin = (x - low) * static_cast<T>(bins) / (high - low);
  return bin < static_cast<T>(bins - 1) ? static_cast<int64_t>(bin) : bins - 1;
}

}  // namespace
}  // namespace fastquant
