// The gradients of fake-quantize with a learnable scale and zero point.
#pragma once

#include "../../math/learnable.h"
#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

template <class V, class S, class T>
int64_t learnable_backward_run(const S* grad, const S* x, S* grad_x, int64_t begin, int64_t n, T scale,
                               T inverse_scale, T zero_point, T quant_min, T quant_max, T grad_factor,
                               LearnableSums* sums) {
  constexpr int64_t kBlock = 1024;  // elements that are summed in T before the sum is added to a double
  const auto gradients =
      LearnableGradients<V>::of(scale, inverse_scale, zero_point, quant_min, quant_max, grad_factor);
  int64_t i = begin;
  while (i + V::N <= n) {
    auto scale_sum = V::set1(T{0}), zero_point_sum = scale_sum;
    const int64_t stop = smaller(n, i + kBlock);
    for (; i + V::N <= stop; i += V::N) {
      const auto terms = gradients(V::load(grad + i), V::load(x + i));
      V::store(grad_x + i, terms.x);
      scale_sum = V::add(scale_sum, terms.scale);
      zero_point_sum = V::add(zero_point_sum, terms.zero_point);
    }
    T lanes[V::N];
    V::store(lanes, scale_sum);
    for (int k = 0; k < V::N; ++k) sums->scale += static_cast<double>(lanes[k]);
    V::store(lanes, zero_point_sum);
    for (int k = 0; k < V::N; ++k) sums->zero_point += static_cast<double>(lanes[k]);
    if (stop - i < V::N && stop == n) break;
  }
  return i;
}

template <class V, class S, class T>
LearnableSums learnable_backward(const S* grad, const S* x, S* grad_x, int64_t n, T scale, T inverse_scale,
                                 T zero_point, T quant_min, T quant_max, T grad_factor) {
  LearnableSums sums = {0, 0};
  const int64_t rest = learnable_backward_run<V>(grad, x, grad_x, 0, n, scale, inverse_scale, zero_point,
                                                 quant_min, quant_max, grad_factor, &sums);
  learnable_backward_run<Scalar<T>>(grad, x, grad_x, rest, n, scale, inverse_scale, zero_point, quant_min,
                                    quant_max, grad_factor, &sums);
  return sums;
}

}  // namespace
}  // namespace fastquant
