// Batch norm, an activation that clamps, and fake-quantize: the arithmetic, and its parameters. V is a vector
// type (vector.h): the same operations for every instruction set and for GPUs, and so the same bits.
#pragma once

#include <cmath>

#include "fake_quantize.h"
#include "range.h"

namespace fastquant {

// Tables of kernels name these types, so they have external linkage.

// The affine map of one channel, x -> (x - mean) * gain + bias. Each operation rounds once and never decreases
// (or, with a negative gain, never increases), so the whole map is monotone as computed: it takes the smallest
// and largest x to the smallest and largest result.
template <class T>
struct ChannelNorm {
  T mean, invstd, gain, bias;
};

// What follows batch norm: a clamp to [low, high], and fake-quantize where `quantizes` is set.
template <class T>
struct Activation {
  T low, high;
  bool quantizes;
  ChannelParams<T> quantizer;
  int64_t quant_min, quant_max;
  // The same clamp together with the quantizer's own, in quantization steps: multiplying by a positive number
  // is monotone as computed, so it may come before the clamp.
  T step_low, step_high;
  // Gradients pass through the normalized values in this range, and through NaN.
  Range<T> passing;
};

// The terms of a channel that x's gradient subtracts: sum(g) / M, and the factor of x - mean.
template <class T>
struct GradientMeans {
  T offset, slope;
};

namespace {

// --------------------------------------------------------------------------- one channel

// 1 / sqrt(var + eps), rounded once more where T is float.
template <class T>
FASTQUANT_HD ChannelNorm<T> channel_norm(double mean, double var, double eps, T weight, T bias) {
  const T invstd = static_cast<T>(1.0 / sqrt(var + eps));
  return {static_cast<T>(mean), invstd, weight * invstd, bias};
}

// Whether no operation on ordinary elements makes a NaN of them.
template <class T>
FASTQUANT_HD bool is_ordinary(T mean, T gain, T bias) {
  return mean - mean == 0 && gain - gain == 0 && bias - bias == 0 && gain != 0;
}

// A step of a running statistic, as in torch.nn.BatchNorm2d.
FASTQUANT_HD inline double moved_statistic(double so_far, double now, double momentum) {
  return (1.0 - momentum) * so_far + momentum * now;
}

template <class V>
struct Normalizer {
  using Reg = typename V::Reg;
  Reg mean, gain, bias;

  FASTQUANT_HD Reg centred(Reg x) const { return V::sub(x, mean); }
  FASTQUANT_HD Reg normalized(Reg centred) const { return V::add(V::mul(centred, gain), bias); }
};

// NaN stays NaN.
template <class V>
FASTQUANT_HD typename V::Reg clamped(typename V::Reg x, typename V::Reg low, typename V::Reg high) {
  return V::min(high, V::max(low, x));
}

template <class T>
FASTQUANT_HD T clamped_number(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// ------------------------------------------------------------------------ activation

// Integers in the order of the numbers whose bits they hold, and back.
FASTQUANT_HD inline int64_t ordered(float x) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x));
  return bits < 0 ? int64_t{INT32_MIN} - bits : bits;
}

FASTQUANT_HD inline int64_t ordered(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? INT64_MIN - bits : bits;
}

FASTQUANT_HD inline float from_ordered(int64_t i, float) {
  return bits_to_float(static_cast<uint32_t>(i < 0 ? INT32_MIN - i : i));
}

FASTQUANT_HD inline double from_ordered(int64_t i, double) {
  if (i < 0) i = INT64_MIN - i;
  double x;
  __builtin_memcpy(&x, &i, sizeof x);
  return x;
}

// The smallest number for which `holds` is true, if it is true for every larger one, too. +inf if there is
// none.
template <class T, class Predicate>
FASTQUANT_HD T smallest_that(const Predicate& holds) {
  int64_t below = ordered(-infinity<T>()), at = ordered(infinity<T>());
  if (holds(-infinity<T>())) return -infinity<T>();
  while (at - 1 > below) {
    const int64_t middle = below / 2 + at / 2 + (below % 2 + at % 2) / 2;
    (holds(from_ordered(middle, T{})) ? at : below) = middle;
  }
  return from_ordered(at, T{});
}

// Whether the quantizer, of a positive scale, does not put a normalized value above the quantized range
// (side = 1) or below it (side = -1).
template <class One>
FASTQUANT_HD bool is_inside(const Activation<typename One::Element>& a, typename One::Element x, int side) {
  const auto& p = a.quantizer;
  if (!a.quantizes) return true;
  if (!p.exact) {
    const auto t = x * p.inverse_scale;
    return side > 0 ? !(t > p.high_edge) : !(t < p.low_edge);
  }
  constexpr int64_t kFar = int64_t{1} << 62;
  const ExactQuantizer<One> q = {
      p.scale, p.inverse_scale, p.zero_point, side > 0 ? -kFar : a.quant_min, side > 0 ? a.quant_max : kFar,
      false};
  bool inside;
  q.value(x, &inside);
  return inside;
}

// All but `passing`, whose search takes long. quantizer: scale, zero point, and whether to fake-quantize, as
// observe_batch_norm_ returns them. The scale must be positive or NaN.
template <class One>
FASTQUANT_HD Activation<typename One::Element> activation_for_values(const double* quantizer, double low,
                                                                     double high, int64_t quant_min,
                                                                     int64_t quant_max) {
  using T = typename One::Element;
  Activation<T> a = {};
  a.low = static_cast<T>(low);
  a.high = static_cast<T>(high);
  a.quantizes = quantizer[2] != 0;
  a.quant_min = quant_min;
  a.quant_max = quant_max;
  a.quantizer = channel_params<T>(static_cast<T>(quantizer[0]), sizeof(T) == sizeof(double),
                                  static_cast<T>(quantizer[1]), false, quant_min, quant_max);
  const ChannelParams<T>& p = a.quantizer;
  a.step_low = clamped_number(a.low * p.inverse_scale, p.low, p.high);
  a.step_high = clamped_number(a.high * p.inverse_scale, p.low, p.high);
  return a;
}

template <class One>
FASTQUANT_HD Activation<typename One::Element> activation_of(const double* quantizer, double low, double high,
                                                             int64_t quant_min, int64_t quant_max) {
  using T = typename One::Element;
  Activation<T> a = activation_for_values<One>(quantizer, low, high, quant_min, quant_max);
  // As in torch, no gradient passes at the bounds of the activation themselves.
  const auto above_low = [&](T x) {
    return !(low > -infinity<double>() && x <= a.low) && is_inside<One>(a, x, -1);
  };
  const auto below_high_negated = [&](T x) {
    return !(high < infinity<double>() && -x >= a.high) && is_inside<One>(a, -x, 1);
  };
  const T inf = infinity<T>();
  a.passing = {inf, -inf};  // none
  if (above_low(inf) && below_high_negated(inf))
    a.passing = {smallest_that<T>(above_low), -smallest_that<T>(below_high_negated)};
  return a;
}

// The result of one element, in the order of operations that every faster way keeps.
template <class One>
FASTQUANT_HD typename One::Element activated(const Activation<typename One::Element>& a,
                                             typename One::Element normalized) {
  const auto& p = a.quantizer;
  const auto x = clamped<One>(normalized, a.low, a.high);
  if (!a.quantizes) return x;
  if (!p.exact) {
    const FakeQuantizer<One> q = {p.scale, p.inverse_scale, p.low, p.high, p.low_edge, p.high_edge};
    return q.value(q.steps(x));
  }
  bool inside;
  const ExactQuantizer<One> q = {p.scale, p.inverse_scale, p.zero_point, a.quant_min, a.quant_max, false};
  return q.value(x, &inside);
}

// Batch norm, the activation and fake-quantize of a vector; the quantizer must not be `exact`.
template <class V>
struct NormalizedQuantizer {
  using Reg = typename V::Reg;
  Reg inverse_scale, step_low, step_high, scale;

  FASTQUANT_HD Reg value(Reg normalized) const {
    const auto magic = V::set1(fast_bound<typename V::Element>() * 3);
    const auto t = clamped<V>(V::mul(normalized, inverse_scale), step_low, step_high);
    return V::mul(V::sub(V::add(t, magic), magic), scale);
  }
};

// --------------------------------------------------------------------------- gradients

// The gradient of the normalized values, and the gradient of x: gain * (g - sum(g) / M - (x - mean) * invstd^2
// * sum(g (x - mean)) / M), https://arxiv.org/abs/1502.03167, section 3. With statistics that do not depend on
// x, gain * g.
template <class V>
struct NormGradients {
  using Reg = typename V::Reg;
  Reg pass_low, pass_high, zero;

  FASTQUANT_HD Reg passed(Reg grad, Reg normalized) const {
    const auto passes = V::both(V::not_lt(normalized, pass_low), V::not_lt(pass_high, normalized));
    return V::select(passes, grad, zero);
  }
};

template <class T>
FASTQUANT_HD GradientMeans<T> gradient_means(double of_bias, double of_gain, T invstd, int64_t count) {
  const double wide = static_cast<double>(invstd), m = static_cast<double>(count);
  return {static_cast<T>(of_bias / m), static_cast<T>(of_gain * wide * wide / m)};
}

template <class V>
FASTQUANT_HD typename V::Reg gradient_of_x(typename V::Reg passed, typename V::Reg centred,
                                           typename V::Reg gain, typename V::Reg offset,
                                           typename V::Reg slope) {
  return V::mul(gain, V::sub(V::sub(passed, offset), V::mul(centred, slope)));
}

}  // namespace
}  // namespace fastquant
