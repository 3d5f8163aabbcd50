// The kernel for the error of quantizing a range of a histogram's bins.
#pragma once

#include "../../math/search.h"
#include "../vec_scalar.h"

namespace fastquant {
namespace {

template <class D>
double sum_of_floats(const float* x, int64_t n) {
  constexpr int kLanes = kErrorLanes;
  constexpr int kRegs = kLanes / D::N;
  typename D::Reg sums[kRegs];
  for (int r = 0; r < kRegs; ++r) sums[r] = D::set1(0.0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegs; ++r) sums[r] = D::add(sums[r], D::load(x + i + r * D::N));
  }
  double lanes[kLanes];
  for (int r = 0; r < kRegs; ++r) D::store(lanes + r * D::N, sums[r]);
  double total = 0;
  for (int k = 0; k < kLanes; ++k) total += lanes[k];
  for (; i < n; ++i) total += static_cast<double>(x[i]);
  return total;
}

// Computes the errors of the bins [begin, end) as far as whole vectors cover them. Returns the first bin that
// is left. start_bin is the first bin of the quantized range.
template <class V>
int64_t errors_of_bins(const float* density, int64_t begin, int64_t end, int64_t start_bin,
                       const BinError<V>& error, float* out) {
  float steps[V::N];
  for (int k = 0; k < V::N; ++k) steps[k] = static_cast<float>(k);
  const auto lane = V::load(steps);
  int64_t i = begin;
  for (; i + V::N <= end; i += V::N) {
    const auto index = V::add(V::set1(static_cast<float>(i - start_bin)), lane);
    V::store(out + i, error(index, V::load(density + i)));
  }
  return i;
}

template <class V, class D>
double quantization_error(const float* density, int64_t bins, double bin_width, int64_t start_bin,
                          int64_t end_bin, double levels, float* scratch) {
  const double dst_width = bin_width * static_cast<double>(end_bin - start_bin + 1) / levels;
  if (dst_width == 0.0) return 0.0;
  const auto error = BinError<V>::of(bin_width, dst_width, levels);
  const auto one_error = BinError<Scalar<float>>::of(bin_width, dst_width, levels);
  const int64_t rest = errors_of_bins(density, 0, bins, start_bin, error, scratch);
  errors_of_bins(density, rest, bins, start_bin, one_error, scratch);
  return sum_of_floats<D>(scratch, bins);
}

}  // namespace
}  // namespace fastquant
