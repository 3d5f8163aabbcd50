// The search for the part of a histogram's range whose quantization loses least.
#pragma once

#include "histogram.h"

namespace fastquant {
namespace {

// ----------------------------------------------------------------- quantization error

// The exact floor(a / b) for quotients from 0 to 2^20; some negative number for negative quotients. inverse_b
// is a little less than 1 / b, so the estimate is either right or one too small, and the remainder shows which.
template <class V>
FASTQUANT_HD typename V::Reg floor_divide(typename V::Reg a, typename V::Reg b, typename V::Reg inverse_b,
                                          typename V::Reg one) {
  const auto quotient = V::floor(V::mul(a, inverse_b));
  return V::select(V::le(b, V::nmadd(quotient, b, a)), V::add(quotient, one), quotient);
}

FASTQUANT_HD inline float cube(float x) { return x * x * x; }

// The squared error of quantizing the values of one bin, computed in the order and precision of
// torch.ao's HistogramObserver._compute_quantization_error. Values are taken as spread evenly
// over their bin; the integral of x² from a to b is (b³ - a³) / 3.
template <class V>
struct BinError {
  using Reg = typename V::Reg;
  Reg width, dst, inverse_dst, half_dst, last, inner, half_cubed, negative_half_cubed, zero, one, half;

  // For bins quantized to `levels` values that lie dst_width apart.
  FASTQUANT_HD static BinError of(double bin_width, double dst_width, double levels) {
    const float half_width = static_cast<float>(dst_width / 2);
    return {V::set1(static_cast<float>(bin_width)),
            V::set1(static_cast<float>(dst_width)),
            V::set1((1.0f - 0x1p-22f) / static_cast<float>(dst_width)),
            V::set1(half_width),
            V::set1(static_cast<float>(levels - 1)),
            V::set1((cube(half_width) - cube(-half_width)) / 3.0f),
            V::set1(cube(half_width)),
            V::set1(cube(-half_width)),
            V::set1(0.0f),
            V::set1(1.0f),
            V::set1(0.5f)};
  }

  // The error of the bins that lie `index` bins after the first quantized one and count density * width each.
  // Quotients below 0 or above `last` need not be exact, because they are clamped.
  FASTQUANT_HD Reg operator()(Reg index, Reg density) const {
    const auto from = V::mul(index, width);
    const auto to = V::add(from, width);
    const auto dst_from = V::min(V::max(floor_divide<V>(from, dst, inverse_dst, one), zero), last);
    const auto dst_to = V::min(V::max(floor_divide<V>(to, dst, inverse_dst, one), zero), last);

    const auto a = V::sub(from, V::mul(V::add(dst_from, half), dst));
    const auto first = V::mul(density, V::third(V::sub(half_cubed, V::mul(V::mul(a, a), a))));

    const auto between = V::sub(V::sub(dst_to, dst_from), one);
    const auto middle = V::mul(between, V::mul(density, inner));

    const auto b = V::sub(to, V::add(V::mul(dst_to, dst), half_dst));
    const auto final = V::mul(density, V::third(V::sub(V::mul(V::mul(b, b), b), negative_half_cubed)));

    return V::add(V::add(first, middle), final);
  }
};

// Lanes in which the errors of bins are summed in double, whatever the vector length: the same
// sum on every instruction set. The bins left over after the last full set of lanes are added at the end.
constexpr int kErrorLanes = 16;

// ------------------------------------------------------------------------------ walk

// The total of a histogram, rounded where torch.sum rounds it on the CPU: the bounds of the search are
// shares of it, and one unit in its last place can move them by a bin. torch.sum adds up 32 chains: four
// vectors of eight floats, each chain in stretches of 16, and 16 stretches at a time.
constexpr int kSumLanes = 8, kSumVectors = 4, kSumChains = kSumLanes * kSumVectors;

// kChains of the chains, from the chain `first`.
template <int kChains>
FASTQUANT_HD void sum_chains(const float* x, int64_t n, int first, float* out) {
  constexpr int kLevels = 4, kBitsOfLevel = 4;
  const int64_t length = n / kSumChains;
  float sums[kLevels][kChains] = {};
  for (int64_t i = 0; i < length;) {
    const float* const row = x + i * kSumChains + first;
    for (int c = 0; c < kChains; ++c) sums[0][c] += row[c];
    ++i;
    for (int level = 1; level < kLevels && i % (int64_t{1} << (level * kBitsOfLevel)) == 0; ++level) {
      for (int c = 0; c < kChains; ++c) {
        sums[level][c] += sums[level - 1][c];
        sums[level - 1][c] = 0;
      }
    }
  }
  for (int c = 0; c < kChains; ++c) out[c] = sums[0][c] + sums[1][c] + sums[2][c] + sums[3][c];
}

// All chains, and the elements after them.
FASTQUANT_HD inline float sum_of_chains(const float* chains, const float* x, int64_t n) {
  const int64_t vectors = n / kSumLanes;
  float total = 0;
  for (int64_t i = vectors * kSumLanes; i < n; ++i) total += x[i];
  for (int lane = 0; lane < kSumLanes; ++lane) {
    float sum = chains[lane];
    for (int64_t v = n / kSumChains * kSumVectors; v < vectors; ++v) sum += x[v * kSumLanes + lane];
    for (int v = 1; v < kSumVectors; ++v) sum += chains[v * kSumLanes + lane];
    total += sum;
  }
  return total;
}

// A walk from both ends of a histogram to the bins that hold the best range: one quantile step
// at a time, until the quantization error grows. The walk, and the precision of each
// comparison, are those of torch.ao's HistogramObserver._non_linear_param_search (after
// caffe2's NormMinimization::NonlinearQuantizationParamsSearch).
class RangeWalk {
 public:
  // cumulative: the counts up to and including each bin; total: the result of sum_of_chains.
  FASTQUANT_HD RangeWalk(const float* cumulative, float total, int64_t bins)
      : cumulative_(cumulative), total_(static_cast<double>(total)), end_(bins - 1) {
    next_start_ = start_;
    next_end_ = end_;
  }

  // Moves to the next candidate range, next_start() to next_end(). Returns false where none is left.
  FASTQUANT_HD bool next() {
    while (alpha_ < beta_ && start_ != end_) {
      const double next_alpha = alpha_ + kStep, next_beta = beta_ - kStep;
      const float lower = static_cast<float>(next_alpha * total_),
                  upper = static_cast<float>(next_beta * total_);
      int64_t left = start_, right = end_;
      while (left < end_ && cumulative_[left] < lower) ++left;
      while (right > start_ && cumulative_[right] > upper) --right;
      next_start_ = start_;
      next_end_ = end_;
      if (left - start_ > end_ - right) {
        next_start_ = left;
        alpha_ = next_alpha;
      } else {
        next_end_ = right;
        beta_ = next_beta;
      }
      if (next_start_ != start_ || next_end_ != end_) return true;
      skip_steps();
    }
    return false;
  }

  // Accepts that range if its error has not grown. Otherwise returns false, and the search ends.
  FASTQUANT_HD bool take(double error) {
    if (error > smallest_error_) return false;
    smallest_error_ = error;
    start_ = next_start_;
    end_ = next_end_;
    return true;
  }

  FASTQUANT_HD int64_t next_start() const { return next_start_; }
  FASTQUANT_HD int64_t next_end() const { return next_end_; }
  // The best range found so far.
  FASTQUANT_HD int64_t start() const { return start_; }
  FASTQUANT_HD int64_t end() const { return end_; }

 private:
  static constexpr double kStep = 1e-5;

  // Takes most of the steps at once that move neither end: in a bin with half of the counts, there are 50,000.
  // They only lower beta_, until it reaches the counts below the last bin. Between two powers of two, each
  // lowers it by the same rounded step, so that their sum is exact.
  FASTQUANT_HD void skip_steps() {
    int exponent = 0;
    frexp(beta_, &exponent);
    const double step = beta_ - (beta_ - kStep), power = ldexp(0.5, exponent);
    const double reached = total_ > 0 ? static_cast<double>(cumulative_[end_]) / total_ : 0.0;
    double bound = power > alpha_ ? power : alpha_;
    bound = reached > bound ? reached : bound;
    const double steps = floor((beta_ - bound) / step) - 2;
    if (steps > 0) beta_ -= steps * step;
  }

  const float* cumulative_;
  double total_;
  double alpha_ = 0, beta_ = 1;
  double smallest_error_ = infinity<double>();
  int64_t start_ = 0, end_;
  int64_t next_start_, next_end_;
};

FASTQUANT_HD inline double width_of_bins(const HistogramRange& r, int64_t bins) {
  const double span = r.high - r.low, count = static_cast<double>(bins);
  return is_finite(span) ? span / count : r.high / count - r.low / count;
}

// The search only compares errors, so the range may be scaled first. A power of two loses no precision, and
// keeps the cubes of bin edges from overflowing float.
FASTQUANT_HD inline double width_for_search(const HistogramRange& r, int64_t bins) {
  int exponent = 0;
  return frexp(width_of_bins(r, bins), &exponent);
}

// The range of the bins [start, end] of a histogram, in the precision of its buffers.
template <class B>
FASTQUANT_HD Range<B> range_of_bins(const HistogramRange& r, int64_t bins, int64_t start, int64_t end) {
  const B base = static_cast<B>(r.low);
  const B span = static_cast<B>(r.high) - base;
  const B width = is_finite(static_cast<double>(span)) ? span / static_cast<B>(bins)
                                                       : static_cast<B>(width_of_bins(r, bins));
  const B upper = base + width * static_cast<B>(end + 1);
  return {start == 0 ? base : base + width * static_cast<B>(start),  // one bin may be infinitely wide
          is_finite(static_cast<double>(upper)) ? upper : static_cast<B>(r.high)};
}

}  // namespace
}  // namespace fastquant
