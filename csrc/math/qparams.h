// Quantization parameters from a range: the arithmetic of one channel. B is the precision of the buffers.
#pragma once

#include <cmath>

#include "range.h"

namespace fastquant {

enum class Scheme : int64_t { affine = 0, symmetric = 1, float_qparams = 2 };

struct QParamsConfig {
  int64_t quant_min;
  int64_t quant_max;
  Scheme scheme;
  int64_t symmetric_zero_point;
};

namespace {

template <class B>
struct ScaleAndZeroPoint {
  B scale;
  double zero_point;  // of any quantized dtype, 32 bits wide too
};

// (high - low) / levels, correct even where high - low overflows.
template <class B>
FASTQUANT_HD B step_of(B low, B high, B levels) {
  const B span = high - low;
  return span == infinity<B>() || span == -infinity<B>() ? high / levels - low / levels : span / levels;
}

// The scale, at least eps. It is never zero: where eps is zero, a tensor of only zeros would make it so.
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

// A learnable zero point is a real number; fake-quantize uses the nearest integer in the quantized range.
FASTQUANT_HD inline double rounded_zero_point(double zero_point, int64_t quant_min, int64_t quant_max) {
  const double nearest = nearbyint(zero_point);
  const double lowest = static_cast<double>(quant_min), highest = static_cast<double>(quant_max);
  if (!(nearest > lowest)) return lowest;
  return nearest < highest ? nearest : highest;
}

}  // namespace
}  // namespace fastquant
