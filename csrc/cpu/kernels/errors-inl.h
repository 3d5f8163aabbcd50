// Kernels that compare a tensor with what quantization made of it.
#pragma once

#include "../kernels.h"
#include "../vec_scalar.h"
#include "fake_quantize-inl.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// Sums in fp64, in lanes whose number does not depend on the instruction set.
template <class D>
void error_sums(const float* reference, const float* x, int64_t n, double* sums) {
  constexpr int kLanes = 16, kRegs = kLanes / D::N;
  typename D::Reg signal[kRegs], noise[kRegs], shared[kRegs];
  for (int r = 0; r < kRegs; ++r) signal[r] = noise[r] = shared[r] = D::set1(0.0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_ahead<kLanes>(reference + i);
    for (int r = 0; r < kRegs; ++r) {
      const auto a = D::load(reference + i + r * D::N);
      const auto error = D::sub(D::load(x + i + r * D::N), a);
      signal[r] = D::add(signal[r], D::mul(a, a));
      noise[r] = D::add(noise[r], D::mul(error, error));
      shared[r] = D::add(shared[r], D::mul(a, error));
    }
  }
  double lanes[3][kLanes];
  for (int r = 0; r < kRegs; ++r) {
    D::store(lanes[0] + r * D::N, signal[r]);
    D::store(lanes[1] + r * D::N, noise[r]);
    D::store(lanes[2] + r * D::N, shared[r]);
  }
  for (int s = 0; s < 3; ++s) {
    sums[s] = 0;
    for (int k = 0; k < kLanes; ++k) sums[s] += lanes[s][k];
  }
  for (; i < n; ++i) {
    const double a = reference[i], error = static_cast<double>(x[i]) - a;
    sums[0] += a * a;
    sums[1] += error * error;
    sums[2] += a * error;
  }
}

template <class V>
int64_t mark_integers(const float* x, int64_t n, const QuantParams<float>& p, uint8_t* used) {
  constexpr int kStep = 32;
  int32_t index[kStep];
  int64_t clipped = 0, i = 0;
  const auto nowhere = static_cast<float>(p.quant_max - p.quant_min + 1);
  const auto locate = [&](auto vector, const float* from, int32_t* to) {
    using W = decltype(vector);
    const auto q = quantizer_of_channel<W>(p, 0);
    const auto a = W::load(from), t = q.steps(a);
    const auto finite = W::le(W::set1(0.0f), W::sub(a, a));
    const auto whole = W::round(W::min(q.high, W::max(q.low, t)));
    W::store_index(to, W::select(finite, W::sub(whole, q.low), W::set1(nowhere)));
    clipped += __builtin_popcount(W::bits(finite)) - __builtin_popcount(W::bits(W::both(finite, q.inside(t))));
  };
  for (; i + kStep <= n; i += kStep) {
    for (int k = 0; k < kStep; k += V::N) locate(V{}, x + i + k, index + k);
    for (int k = 0; k < kStep; ++k) used[index[k]] = 1;
  }
  for (; i < n; ++i) {
    locate(Scalar<float>{}, x + i, index);
    used[index[0]] = 1;
  }
  return clipped;
}

}  // namespace
}  // namespace fastquant
