// Ranges, and quantization parameters from them: the arithmetic of one channel. B is the
// precision of the buffers.
#pragma once

#include <cmath>

#include "formulas.h"

namespace fastquant {

// What an observing op does with NaN and infinities.
enum class NonFinite : int64_t { ignore = 0, raise = 1, propagate = 2 };

enum class Scheme : int64_t { affine = 0, symmetric = 1, float_qparams = 2 };

struct QParamsConfig {
  int64_t quant_min;
  int64_t quant_max;
  Scheme scheme;
  int64_t symmetric_zero_point;
};

template <class B>
struct Range {
  B low, high;
};

namespace {

// Whether anything was observed.
template <class B>
FASTQUANT_HD bool is_observed(Range<B> r) {
  return !(r.low == infinity<B>() && r.high == -infinity<B>());
}

// NaN wins.
template <class B>
FASTQUANT_HD B least(B a, B b) {
  return a != a ? a : (b < a || b != b ? b : a);
}

template <class B>
FASTQUANT_HD B greatest(B a, B b) {
  return a != a ? a : (a < b || b != b ? b : a);
}

// A finite value no larger than what a type holds whose largest number is `most`; infinities stay.
template <class T>
FASTQUANT_HD T kept_finite(T value, double most) {
  if (value - value != 0 || !(static_cast<double>(value < 0 ? -value : value) > most)) return value;
  return static_cast<T>(value < 0 ? -most : most);
}

// A step of a moving average, also where the way to go is longer than the largest number.
template <class B>
FASTQUANT_HD B moved_average(B so_far, B now, B constant) {
  const B way = now - so_far;
  if (way - way == 0 || so_far - so_far != 0 || now - now != 0) return so_far + constant * way;
  return (B{1} - constant) * so_far + constant * now;
}

// The extremes of a tensor folded into those so far: running where `averages` is false, else
// a moving average.
template <class B>
FASTQUANT_HD Range<B> folded(Range<B> so_far, Range<B> now, bool averages, B constant) {
  if (!averages) return {least(now.low, so_far.low), greatest(now.high, so_far.high)};
  if (!is_observed(so_far)) return now;
  return {moved_average(so_far.low, now.low, constant), moved_average(so_far.high, now.high, constant)};
}

// Rounded towards zero, as far as the type goes; NaN is 0.
template <class Integer, class T>
FASTQUANT_HD Integer saturated(T x) {
  constexpr int kBits = 8 * static_cast<int>(sizeof(Integer));
  constexpr Integer kLargest = static_cast<Integer>(~uint64_t{0} >> (65 - kBits));
  const T beyond = static_cast<T>(uint64_t{1} << (kBits - 1));
  if (x != x) return 0;
  if (x >= beyond) return kLargest;
  return x < -beyond ? -kLargest - 1 : static_cast<Integer>(x);
}

template <class B>
struct ScaleAndZeroPoint {
  B scale;
  double zero_point;  // of any quantized dtype, 32 bits wide too
};

// (high - low) / levels, also where high - low is beyond the largest number.
template <class B>
FASTQUANT_HD B step_of(B low, B high, B levels) {
  const B span = high - low;
  return span == infinity<B>() || span == -infinity<B>() ? high / levels - low / levels : span / levels;
}

// At least eps; and never zero, as nothing but zeros would make it where eps is zero.
template <class B>
FASTQUANT_HD B usable_scale(B scale, B eps) {
  if (scale < eps) scale = eps;
  return scale == 0 ? B{1} : scale;
}

// The formulas, and their order of rounding, are those of torch.ao's
// UniformQuantizationObserverBase._calculate_qparams. A range of NaN gives a scale of NaN, and
// quant_min as the zero point.
template <class B>
FASTQUANT_HD ScaleAndZeroPoint<B> qparams_of(Range<B> range, B eps, const QParamsConfig& c) {
  const B low = range.low, high = range.high;
  if (!is_observed(range)) return {B{1}, 0};
  const B levels = static_cast<B>(c.quant_max - c.quant_min);
  if (c.scheme == Scheme::float_qparams) {
    B scale = step_of(low, high, levels);
    if (!(scale > eps)) scale = B{1};
    return {scale, static_cast<double>(-low / scale)};
  }
  const B negative = B{0} < low ? B{0} : low, positive = high < B{0} ? B{0} : high;
  if (c.scheme == Scheme::symmetric) {
    const B reach = -negative < positive ? positive : -negative;
    const B scale = reach / static_cast<B>(static_cast<double>(c.quant_max - c.quant_min) / 2);
    return {usable_scale(scale, eps), static_cast<double>(c.symmetric_zero_point)};
  }
  const B scale = usable_scale(step_of(negative, positive, levels), eps);
  const double lowest = static_cast<double>(c.quant_min), highest = static_cast<double>(c.quant_max);
  const double zero_point = lowest - nearbyint(static_cast<double>(negative / scale));
  if (!(zero_point > lowest)) return {scale, lowest};
  return {scale, zero_point < highest ? zero_point : highest};
}

// The whole zero point that a learnable one stands for.
FASTQUANT_HD inline double whole_zero_point(double zero_point, int64_t quant_min, int64_t quant_max) {
  const double nearest = nearbyint(zero_point);
  const double lowest = static_cast<double>(quant_min), highest = static_cast<double>(quant_max);
  if (!(nearest > lowest)) return lowest;
  return nearest < highest ? nearest : highest;
}

}  // namespace
}  // namespace fastquant
