// Kernels for weights folded with batch norm, and their gradients.
#pragma once

#include "../../math/folded_weight.h"
#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

template <class S, class V, class T>
WeightFolder<S, V> weight_folder(T s, const ChannelParams<T>& p) {
  return {V::set1(s),
          {V::set1(p.scale), V::set1(p.inverse_scale), V::set1(p.low), V::set1(p.high), V::set1(p.low_edge),
           V::set1(p.high_edge)}};
}

template <class S, class T>
ExactWeightFolder<S, Scalar<T>> exact_weight_folder(T s, const ChannelParams<T>& p, int64_t quant_min,
                                                    int64_t quant_max) {
  return {s, {p.scale, p.inverse_scale, p.zero_point, quant_min, quant_max, false}};
}

template <class V, class S, class F, class T>
void fold_weight(const S* weight, F* folded, int64_t n, const ChannelFold<T>& fold, int64_t quant_min,
                 int64_t quant_max) {
  using One = Scalar<T>;
  const ChannelParams<T> params = params_of(fold, quant_min, quant_max);
  int64_t i = 0;
  if (params.exact) {
    const auto folder = exact_weight_folder<S>(fold.s, params, quant_min, quant_max);
    for (; i < n; ++i) One::store(folded + i, folder.folded(One::load(weight + i)));
    return;
  }
  const auto folder = weight_folder<S, V>(fold.s, params);
  for (; i + V::N <= n; i += V::N) {
    if (i % 64 == 0) fetch_ahead<64>(weight + i);
    V::store(folded + i, folder.folded(V::load(weight + i)));
  }
  const auto one = weight_folder<S, One>(fold.s, params);
  for (; i < n; ++i) One::store(folded + i, one.folded(One::load(weight + i)));
}

// The sum has the same lanes whatever V::N is, so every instruction set gives the same bits.
template <class V, class S, class F, class T>
double fold_weight_backward(const F* grad, const S* weight, S* grad_weight, int64_t n,
                            const ChannelFold<T>& fold, int64_t quant_min, int64_t quant_max) {
  constexpr int kLanes = 16, kVectors = kLanes / V::N;
  constexpr int64_t kBlock = 1024;  // elements that are summed in T before the sum is added to a double
  using One = Scalar<T>;
  const ChannelParams<T> params = params_of(fold, quant_min, quant_max);
  double total = 0;
  int64_t i = 0;
  T g;
  if (params.exact) {
    const auto folder = exact_weight_folder<S>(fold.s, params, quant_min, quant_max);
    for (; i < n; ++i) {
      total += static_cast<double>(folder.gradient(One::load(grad + i), One::load(weight + i), &g));
      One::store(grad_weight + i, g);
    }
    return total;
  }
  const auto folder = weight_folder<S, V>(fold.s, params);
  const int64_t whole = n - n % kLanes;
  while (i < whole) {
    typename V::Reg sums[kVectors], grads;
    for (auto& sum : sums) sum = V::set1(T{0});
    for (const int64_t stop = smaller(whole, i + kBlock); i < stop; i += kLanes) {
      fetch_ahead<kLanes>(grad + i);
      fetch_ahead<kLanes>(weight + i);
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = i + k * V::N;
        sums[k] = V::add(sums[k], folder.gradient(V::load(grad + at), V::load(weight + at), &grads));
        V::store(grad_weight + at, grads);
      }
    }
    T lanes[kLanes];
    for (int k = 0; k < kVectors; ++k) V::store(lanes + k * V::N, sums[k]);
    for (const T lane : lanes) total += static_cast<double>(lane);
  }
  const auto one = weight_folder<S, One>(fold.s, params);
  for (; i < n; ++i) {
    total += static_cast<double>(one.gradient(One::load(grad + i), One::load(weight + i), &g));
    One::store(grad_weight + i, g);
  }
  return total;
}

}  // namespace
}  // namespace fastquant
