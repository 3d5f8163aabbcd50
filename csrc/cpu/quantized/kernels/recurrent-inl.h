// The bodies of the kernels of recurrent layers. Everything here is in an anonymous namespace, and std:: is not
// used: see ../../kernels-inl.h.
#pragma once

#include "../../vec_scalar.h"
#include "../recurrent_kernels.h"

namespace fastquant {
namespace {

// x * P(x^2) / Q(x^2), a fit of relative error 2.1e-8 up to |x| = 9.02, from where on fp32 has 1. With the
// rounding of its own operations, it is within 3e-7 of tanh. NaN gives NaN: bounds are the first arguments of
// min and max.
template <class V>
typename V::Reg hyperbolic_tangent(typename V::Reg given) {
  const auto most = V::set1(9.02f), one = V::set1(1.0f);
  const auto x = V::min(most, V::max(V::set1(-9.02f), given));
  const auto square = V::mul(x, x);
  auto p = V::set1(0x1.c9a3c2p-27f);
  p = V::madd(p, square, V::set1(0x1.59555ep-16f));
  p = V::madd(p, square, V::set1(0x1.c9f856p-9f));
  p = V::madd(p, square, V::set1(0x1.120442p-3f));
  p = V::madd(p, square, one);
  auto q = V::set1(0x1.a0b85cp-21f);
  q = V::madd(q, square, V::set1(0x1.5841d8p-12f));
  q = V::madd(q, square, V::set1(0x1.a7df24p-6f));
  q = V::madd(q, square, V::set1(0x1.de576ap-2f));
  q = V::madd(q, square, one);
  const auto y = V::div(V::mul(x, p), q);
  return V::min(one, V::max(V::set1(-1.0f), y));
}

// 1 / (1 + exp(-x)) = 0.5 + 0.5 * tanh(x / 2)
template <class V>
typename V::Reg logistic(typename V::Reg x) {
  const auto half = V::set1(0.5f);
  return V::madd(half, hyperbolic_tangent<V>(V::mul(x, half)), half);
}

// What a gate is applied to: from_x + from_h.
template <class V>
typename V::Reg gate(const float* from_x, const float* from_h, int64_t at) {
  return V::add(V::load(from_x + at), V::load(from_h + at));
}

// The units from `first` on, as far as whole vectors reach. Returns where they end.
template <class V>
int64_t lstm_units(const float* x, const float* from_h, int64_t hidden, int64_t first, float* c, float* h) {
  int64_t i = first;
  for (; i + V::N <= hidden; i += V::N) {
    const auto in = logistic<V>(gate<V>(x, from_h, i));
    const auto forget = logistic<V>(gate<V>(x, from_h, hidden + i));
    const auto cell = hyperbolic_tangent<V>(gate<V>(x, from_h, 2 * hidden + i));
    const auto out = logistic<V>(gate<V>(x, from_h, 3 * hidden + i));
    const auto next = V::add(V::mul(forget, V::load(c + i)), V::mul(in, cell));
    V::store(c + i, next);
    V::store(h + i, V::mul(out, hyperbolic_tangent<V>(next)));
  }
  return i;
}

template <class V>
int64_t gru_units(const float* x, const float* from_h, int64_t hidden, int64_t first, float* h) {
  int64_t i = first;
  for (; i + V::N <= hidden; i += V::N) {
    const auto reset = logistic<V>(gate<V>(x, from_h, i));
    const auto update = logistic<V>(gate<V>(x, from_h, hidden + i));
    const auto recalled = V::mul(V::load(from_h + 2 * hidden + i), reset);
    const auto candidate = hyperbolic_tangent<V>(V::add(V::load(x + 2 * hidden + i), recalled));
    V::store(h + i, V::add(V::mul(V::sub(V::load(h + i), candidate), update), candidate));
  }
  return i;
}

template <class V>
void lstm(const float* from_x, const float* from_h, int64_t hidden, float* c, float* h) {
  const int64_t rest = lstm_units<V>(from_x, from_h, hidden, 0, c, h);
  lstm_units<Scalar<float>>(from_x, from_h, hidden, rest, c, h);
}

template <class V>
void gru(const float* from_x, const float* from_h, int64_t hidden, float* h) {
  const int64_t rest = gru_units<V>(from_x, from_h, hidden, 0, h);
  gru_units<Scalar<float>>(from_x, from_h, hidden, rest, h);
}

template <class V>
constexpr RecurrentKernels recurrent_table() {
  return {lstm<V>, gru<V>};
}

}  // namespace
}  // namespace fastquant
