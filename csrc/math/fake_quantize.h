// Fake-quantize: what is done to one vector of elements, and the parameters that this takes. V is a vector
// type (vector.h): the same operations for every instruction set and for GPUs, and so the same bits.
#pragma once

#include "numbers.h"

namespace fastquant {

// The parameters of one channel. Tables of kernels name this type, so it has external linkage.
template <class T>
struct ChannelParams {
  T scale, inverse_scale, zero_point;
  // See FakeQuantizer. The edges are used only where `exact` is false.
  T low, high, low_edge, high_edge;
  // Whether ExactQuantizer has to be used: for float zero points, for integers too large for T to represent
  // exactly, and for scales that are not normal numbers. Otherwise both quantizers give the same result.
  bool exact;
};

namespace {

// Largest |low|, |high| of the fast path: rounding by adding 1.5 * 2^digits is exact there.
template <class T>
FASTQUANT_HD constexpr T fast_bound() {
  return sizeof(T) == sizeof(float) ? T(4194304) : T(2251799813685248);
}

// With r = round(x / scale), quantizing clamps r to [low, high], where low = quant_min -
// zero_point and high = quant_max - zero_point: the zero point cancels out. x / scale
// rounds into that range where low_edge <= x / scale <= high_edge, half a step outside and
// ties to even taken into account. channel_params makes them.
template <class V>
struct FakeQuantizer {
  using Reg = typename V::Reg;
  Reg scale, inverse_scale, low, high, low_edge, high_edge;

  // x / scale.
  FASTQUANT_HD Reg steps(Reg x) const { return V::mul(x, inverse_scale); }

  // NaN stays NaN, because max and min return their second argument where either argument is NaN. Clamping
  // before rounding gives the same, low and high being whole, and allows rounding by an addition, whose zero is
  // never negative.
  FASTQUANT_HD Reg value(Reg t) const {
    const auto magic = V::set1(fast_bound<typename V::Element>() * 3);
    const auto clamped = V::min(high, V::max(low, t));
    return V::mul(V::sub(V::add(clamped, magic), magic), scale);
  }

  // Whether the gradient passes. It does where x is NaN.
  FASTQUANT_HD typename V::Mask inside(Reg t) const {
    return V::both(V::not_lt(t, low_edge), V::not_lt(high_edge, t));
  }
};

// Follows torch's own arithmetic: it computes integers as int64 and the product in double, and adds a float
// zero point by a fused multiply-add, as the compiled torch does. V has one element.
template <class V>
struct ExactQuantizer {
  using T = typename V::Element;
  T scale, inverse_scale, zero_point;
  int64_t quant_min, quant_max;
  bool float_zero_point;  // round(x / scale + zero_point) instead of round(x / scale) + zero_point

  FASTQUANT_HD T value(T x, bool* inside) const {
    *inside = true;
    if (x != x) return x;
    const T rounded = float_zero_point ? V::round(V::madd(x, inverse_scale, zero_point))
                                       : V::round(x * inverse_scale) + zero_point;
    constexpr int64_t kHuge = int64_t{1} << 62;
    const T huge = static_cast<T>(kHuge);
    int64_t q = rounded > -huge ? (rounded < huge ? static_cast<int64_t>(rounded) : kHuge) : -kHuge;
    *inside = q >= quant_min && q <= quant_max;
    q = q < quant_min ? quant_min : q;
    q = q > quant_max ? quant_max : q;
    const double product =
        (static_cast<double>(q) - static_cast<double>(zero_point)) * static_cast<double>(scale);
    return static_cast<T>(product);
  }
};

// ------------------------------------------------------------------------- parameters

// The floating-point neighbour of a finite nonzero number, away from zero or towards zero.
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

// The furthest value above (side = 1) or below (side = -1) a whole-number bound that still rounds to the bound,
// ties to even.
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

// The reciprocal is computed in the scale's own precision, as torch does; double_scale says whether that is
// fp64.
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

// ---------------------------------------------------------------------------- weights

// x / scale, rounded to nearest with ties to even, between the whole numbers low and high. NaN is 0, as
// in torch.quantize_per_channel. Rounding by an addition is exact up to 2^22.
FASTQUANT_HD inline int8_t quantized_to_int8(float x, float inverse_scale, float low, float high) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float t = x * inverse_scale;
  const float clamped = t < low ? low : t > high ? high : t;
  const float rounded = (clamped + kMagic) - kMagic;
  return static_cast<int8_t>(static_cast<int32_t>(t == t ? rounded : 0.0f));
}

}  // namespace
}  // namespace fastquant
