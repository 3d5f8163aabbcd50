// Kernels for the clamped sum of two tensors: its extremes, and the sum itself, fake-quantized or not.
#pragma once

#include "fake_quantize-inl.h"
#include "minmax-inl.h"

namespace fastquant {
namespace {

template <class V, class S, class T>
void minmax_of_sum(const Summands<S, T>& x, int64_t begin, int64_t end, T* low, T* high, bool* nonfinite) {
  minmax_of<V>(Sums<S>{x.a + begin, x.b + begin}, end - begin, low, high, nonfinite);
}

template <class V, class S, class T>
void minmax_finite_of_clamped_sum(const Summands<S, T>& x, int64_t begin, int64_t end, T* low, T* high,
                                  int64_t* nonfinite) {
  const ClampedSums<S> sums = {{x.a + begin, x.b + begin, x.low, x.high}};
  minmax_finite_of<V>(sums, end - begin, low, high, nonfinite);
}

template <class V, class S, class T>
void fake_quantize_clamped_sum(const Summands<S, T>& x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                               const QuantParams<T>& p) {
  fake_quantize_rows_of<V>(ClampedSums<S>{x}, y, mask, begin, end, p);
}

template <class V, class S, class T>
void clamped_sum(const Summands<S, T>& x, S* y, uint64_t* mask, int64_t begin, int64_t end) {
  const ClampedSums<S> sums = {x};
  BitWriter writer(mask == nullptr ? nullptr : mask + begin / 64);
  const auto store = [&](auto vector, int64_t i) {
    using W = decltype(vector);
    const auto value = sums.template load<W>(i);
    W::store(y + i, value);
    writer.push(W::bits(sums.template sum<W>().passes(value)), W::N);
  };
  int64_t i = begin;
  for (; i + V::N <= end; i += V::N) store(V{}, i);
  for (; i < end; ++i) store(Scalar<T>{}, i);
  writer.flush();
}

}  // namespace
}  // namespace fastquant
