// The sum of two elements, clamped to the bounds of an activation such as ReLU, ahead of fake-quantize. V is a
// vector type (vector.h).
#pragma once

#include "numbers.h"

namespace fastquant {
namespace {

template <class V>
struct ClampedSum {
  using Reg = typename V::Reg;
  Reg low, high;  // NaN where there is no bound

  // The sum is rounded as an element of type S, like the result of torch.add, and then clamped. NaN stays NaN,
  // and a bound of NaN changes nothing, because max and min return their second argument where either is NaN.
  template <class S>
  FASTQUANT_HD Reg value(const S* type, Reg a, Reg b) const {
    return V::min(high, V::max(low, V::rounded_to(type, V::add(a, b))));
  }

  // Whether the gradient passes, by the value: strictly between the bounds, as for torch's relu and hardtanh.
  // It passes where the value is NaN.
  FASTQUANT_HD typename V::Mask passes(Reg value) const {
    return V::both(V::not_le(value, low), V::not_le(high, value));
  }
};

// The bound of a ClampedSum of elements of type S: rounded as such an element, and NaN where it is infinite and
// therefore bounds nothing.
template <class S>
FASTQUANT_HD Compute<S> bound_of_sum(double bound) {
  S element;
  from_compute(&element, static_cast<Compute<S>>(bound));
  const Compute<S> value = to_compute(element);
  return value - value == 0 ? value : static_cast<Compute<S>>(__builtin_nan(""));
}

}  // namespace
}  // namespace fastquant
