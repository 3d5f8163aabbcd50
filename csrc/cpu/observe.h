// Statistics of a tensor, and quantization parameters from statistics.
#pragma once

#include "tensors.h"

namespace fastquant {

// What an observing op does with NaN and infinities.
enum class NonFinite : int64_t { ignore = 0, raise = 1, propagate = 2 };

enum class Scheme : int64_t { affine = 0, symmetric = 1, float_qparams = 2 };

struct QParamsConfig {
  int64_t quant_min;
  int64_t quant_max;
  Scheme scheme;
  int64_t symmetric_zero_point;
};

void observe_minmax(const Tensor& x, Tensor& min_val, Tensor& max_val, Tensor& nonfinite_count,
                    std::optional<int64_t> ch_axis, std::optional<double> averaging_constant, int64_t nonfinite);

// Writes one scale and zero point for each element of min_val.
void choose_qparams_into(const Tensor& min_val, const Tensor& max_val, const Tensor& eps,
                         const QParamsConfig& config, Tensor& scale, Tensor& zero_point);

}  // namespace fastquant
