// A scale and zero point, made ready for the inner loop of fake-quantize.
#pragma once

#include "formulas.h"

namespace fastquant {
namespace {

// The neighbour of a finite number other than zero, by a step away from zero or towards it.
FASTQUANT_HD inline float next_to(float x, bool away) {
  return bits_to_float(away ? float_to_bits(x) + 1u : float_to_bits(x) - 1u);
}

FASTQUANT_HD inline double next_to(double x, bool away) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = away ? bits + 1u : bits - 1u;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The furthest value on that side of a whole bound that rounds to it, ties to even.
template <class T>
FASTQUANT_HD T rounding_edge(T bound, int side) {
  const T half = bound + static_cast<T>(0.5) * static_cast<T>(side);
  const bool even = static_cast<int64_t>(bound) % 2 == 0;
  return even ? half : next_to(half, (half < 0) == (side > 0));
}

template <class T>
FASTQUANT_HD bool is_within(T x, T bound) {
  return x >= -bound && x <= bound;
}

template <class T>
struct ChannelParams {
  T scale, inverse_scale, zero_point;
  // See FakeQuantizer; the edges only where not exact.
  T low, high, low_edge, high_edge;
  // Whether only ExactQuantizer will do: float zero points, integers that T cannot tell apart,
  // scales that are no normal number. Elsewhere both give the same.
  bool exact;
};

// Taken in the scale's own precision, as torch does; double_scale: whether that is fp64.
template <class T>
FASTQUANT_HD T reciprocal(T scale, bool double_scale) {
  return double_scale ? static_cast<T>(1.0 / static_cast<double>(scale))
                      : static_cast<T>(1.0f / static_cast<float>(scale));
}

template <class T>
FASTQUANT_HD ChannelParams<T> channel_params(T scale, bool double_scale, T zero_point, bool float_zero_point,
                                             int64_t quant_min, int64_t quant_max) {
  constexpr T kSmallestNormal = sizeof(T) == sizeof(float) ? T(0x1p-126) : T(0x1p-1022);
  ChannelParams<T> p;
  p.scale = scale;
  p.inverse_scale = reciprocal(scale, double_scale);
  p.zero_point = zero_point;
  p.low = static_cast<T>(quant_min) - zero_point;
  p.high = static_cast<T>(quant_max) - zero_point;
  const T bound = fast_bound<T>();
  const bool whole = is_within(p.low, bound) && is_within(p.high, bound) && is_within(zero_point, bound);
  const bool normal = is_within(scale, largest<T>()) && (scale >= kSmallestNormal || scale <= -kSmallestNormal);
  p.exact = float_zero_point || !whole || !normal;
  p.low_edge = p.exact ? p.low : rounding_edge(p.low, -1);
  p.high_edge = p.exact ? p.high : rounding_edge(p.high, 1);
  return p;
}

}  // namespace
}  // namespace fastquant
