// The gradients of fake-quantize with a learnable scale and zero point. V is a vector type (vector.h).
#pragma once

#include "numbers.h"

namespace fastquant {
namespace {

// LSQ, https://openreview.net/pdf?id=rkgO66VKDS. With x̂ the fake-quantized x, the gradient of the scale is
// (x̂ - x) / scale inside the range, and the bound minus the zero point outside. The gradient of the zero point
// is 0 inside and -scale outside.
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
    // NaN counts as inside: the gradient of x passes, and the gradient of the scale becomes NaN.
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
