// What is done to one vector of elements: the same words for every instruction set and for
// GPUs, and so the same bits. V is a vector type; cpu/vec_scalar.h describes the interface.
//
// Everything is in an anonymous namespace, and nothing of std:: is used: a function that the
// linker could share with another file might bring this file's instructions to a processor
// that lacks them.
#pragma once

#include "numbers.h"

namespace fastquant {
namespace {

template <class T>
FASTQUANT_HD constexpr T infinity() {
  return static_cast<T>(__builtin_inf());
}

template <class T>
FASTQUANT_HD constexpr T largest() {
  return sizeof(T) == sizeof(float) ? static_cast<T>(0x1.fffffep127) : static_cast<T>(__DBL_MAX__);
}

// -------------------------------------------------------------------------- histogram

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

  // To be truncated; only of what is inside.
  FASTQUANT_HD Reg bin(Reg x) const { return V::min(V::div(V::mul(V::sub(x, low), bins), width), last); }
};

// ----------------------------------------------------------------- quantization error

// floor(a / b) of a quotient from 0 to 2^20, exact; a number below 0 for one below 0. inverse_b is a
// little less than 1 / b, so that the estimate is right or one too small, which the remainder tells.
template <class V>
FASTQUANT_HD typename V::Reg floor_divide(typename V::Reg a, typename V::Reg b, typename V::Reg inverse_b,
                                          typename V::Reg one) {
  const auto quotient = V::floor(V::mul(a, inverse_b));
  return V::select(V::le(b, V::nmadd(quotient, b, a)), V::add(quotient, one), quotient);
}

FASTQUANT_HD inline float cube(float x) { return x * x * x; }

// The squared error that quantizing the values of a bin makes, in the order and precision of
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

  // Of the bins that lie `index` bins after the first quantized one and hold density * width. What
  // is below 0 or above `last` need not be divided exactly.
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
// sum on every instruction set. What is left over after whole rounds of lanes comes last.
constexpr int kErrorLanes = 16;

// ---------------------------------------------------------------------- fake-quantize

// Largest |low|, |high| of the fast path: rounding by adding 1.5 * 2^digits is exact there.
template <class T>
FASTQUANT_HD constexpr T fast_bound() {
  return sizeof(T) == sizeof(float) ? T(4194304) : T(2251799813685248);
}

// With r = round(x / scale), quantizing clamps r to [low, high], where low = quant_min -
// zero_point and high = quant_max - zero_point: the zero point cancels out. x / scale
// rounds into that range where low_edge <= x / scale <= high_edge, half a step outside and
// ties to even taken into account. channel_params.h makes them.
template <class V>
struct FakeQuantizer {
  using Reg = typename V::Reg;
  Reg scale, inverse_scale, low, high, low_edge, high_edge;

  // x / scale.
  FASTQUANT_HD Reg steps(Reg x) const { return V::mul(x, inverse_scale); }

  // NaN stays NaN, since max and min return their second argument where either is one. Clamping before
  // rounding gives the same, low and high being whole, and allows rounding by an addition, whose zero is
  // never negative.
  FASTQUANT_HD Reg value(Reg t) const {
    const auto magic = V::set1(fast_bound<typename V::Element>() * 3);
    const auto clamped = V::min(high, V::max(low, t));
    return V::mul(V::sub(V::add(clamped, magic), magic), scale);
  }

  // Whether the gradient passes; that of NaN does.
  FASTQUANT_HD typename V::Mask inside(Reg t) const {
    return V::both(V::not_lt(t, low_edge), V::not_lt(high_edge, t));
  }
};

// Integers as int64, the product in double, as torch does; and like torch's build, a float
// zero point is added without rounding in between. V of one element.
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

// ----------------------------------------------------------- symmetric, to integers

// x / scale, rounded to nearest with ties to even, between the whole numbers low and high. NaN is 0, as
// in torch.quantize_per_channel. Rounding by an addition is exact up to 2^22.
FASTQUANT_HD inline int8_t quantized_to_int8(float x, float inverse_scale, float low, float high) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float t = x * inverse_scale;
  const float clamped = t < low ? low : t > high ? high : t;
  const float rounded = (clamped + kMagic) - kMagic;
  return static_cast<int8_t>(static_cast<int32_t>(t == t ? rounded : 0.0f));
}

// -------------------------------------------------------------------------- learnable

// LSQ, https://openreview.net/pdf?id=rkgO66VKDS: inside the range the scale's gradient is
// (x̂ - x) / scale, outside it is the bound less the zero point; the zero point's is -scale
// outside and nothing inside.
template <class V>
struct LearnableGradients {
  using Reg = typename V::Reg;
  using T = typename V::Element;
  Reg zero, scale, inverse, zero_point, low, high, factor, below, above, outside;

  struct Terms {
    Reg x, scale, zero_point;
  };

  FASTQUANT_HD static LearnableGradients of(T scale, T inverse_scale, T zero_point, T quant_min, T quant_max,
                                            T grad_factor) {
    return {V::set1(T{0}),
            V::set1(scale),
            V::set1(inverse_scale),
            V::set1(zero_point),
            V::set1(quant_min),
            V::set1(quant_max),
            V::set1(grad_factor),
            V::set1(quant_min - zero_point),
            V::set1(quant_max - zero_point),
            V::set1(-scale)};
  }

  FASTQUANT_HD Terms operator()(Reg grad, Reg x) const {
    const auto q = V::add(V::round(V::mul(x, inverse)), zero_point);
    const auto small = V::lt(q, low);
    // NaN counts as inside: its gradient passes, and that of the scale becomes NaN.
    const auto inside = V::both(V::not_lt(q, low), V::not_lt(high, q));
    const auto error = V::mul(V::sub(V::mul(V::sub(q, zero_point), scale), x), inverse);
    const auto slope = V::select(inside, error, V::select(small, below, above));
    const auto shift = V::select(inside, zero, outside);
    return {V::select(inside, grad, V::mul(grad, zero)), V::mul(V::mul(grad, slope), factor),
            V::mul(V::mul(grad, shift), factor)};
  }
};

}  // namespace
}  // namespace fastquant
