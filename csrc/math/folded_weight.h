// A weight quantized as inference will see it: q(w s) / s, where s = bn_weight / bn_std is what batch norm will
// multiply the output channel by. Every step rounds once to the weight's own
// type S, as separate torch ops would. V is a vector type (vector.h).
#pragma once

#include "fake_quantize.h"

namespace fastquant {

// One output channel. The op's result `fold` has these values of every channel, each in a row of its own.
template <class T>
struct ChannelFold {
  T s;  // 0 where the weight stays as it is: where batch norm multiplies by 0, or nothing is quantized
  T bn_std;
  T scale, inverse_scale, zero_point;
};
constexpr int kFoldRows = 5;

namespace {

// x rounded to S, in the type of the arithmetic.
template <class S, class V>
FASTQUANT_HD typename V::Reg as_stored(typename V::Reg x) {
  if constexpr (sizeof(S) == sizeof(typename V::Element)) {
    return x;
  } else if constexpr (V::N == 1) {
    S stored;
    from_compute(&stored, x);
    return to_compute(stored);
  } else {
    S stored[V::N];
    V::store(stored, x);
    return V::load(stored);
  }
}

template <class T>
FASTQUANT_HD ChannelParams<T> params_of(const ChannelFold<T>& fold, int64_t quant_min, int64_t quant_max) {
  auto p = channel_params<T>(fold.scale, false, fold.zero_point, false, quant_min, quant_max);
  p.inverse_scale = fold.inverse_scale;
  return p;
}

// What is done to one vector of a channel whose s is not 0.
template <class S, class V>
struct WeightFolder {
  using Reg = typename V::Reg;
  Reg s;
  FakeQuantizer<V> quantizer;

  FASTQUANT_HD Reg folded(Reg weight) const {
    const Reg product = as_stored<S, V>(V::mul(weight, s));
    return V::div(as_stored<S, V>(quantizer.value(quantizer.steps(product))), s);
  }

  // Sets *grad_weight, and returns the term of this weight in the gradient of s, times s.
  FASTQUANT_HD Reg gradient(Reg grad, Reg weight, Reg* grad_weight) const {
    const Reg zero = V::set1(0), one = V::set1(1);
    const Reg product = as_stored<S, V>(V::mul(weight, s));
    const Reg steps = quantizer.steps(product);
    const auto inside = quantizer.inside(steps);
    // A product, not a selection: the sign of zero, and NaN, come out as torch's.
    *grad_weight = V::mul(grad, V::select(inside, one, zero));
    const Reg error = V::sub(V::select(inside, product, zero), as_stored<S, V>(quantizer.value(steps)));
    return V::mul(grad, V::div(error, s));
  }
};

// The same with ExactQuantizer. V has one element.
template <class S, class V>
struct ExactWeightFolder {
  using T = typename V::Element;
  T s;
  ExactQuantizer<V> quantizer;

  FASTQUANT_HD T folded(T weight) const {
    bool inside;
    const T product = as_stored<S, V>(weight * s);
    return as_stored<S, V>(quantizer.value(product, &inside)) / s;
  }

  FASTQUANT_HD T gradient(T grad, T weight, T* grad_weight) const {
    bool inside;
    const T product = as_stored<S, V>(weight * s);
    const T quantized = as_stored<S, V>(quantizer.value(product, &inside));
    *grad_weight = grad * (inside ? T{1} : T{0});
    return grad * (((inside ? product : T{0}) - quantized) / s);
  }
};

}  // namespace
}  // namespace fastquant
