// Statistics of a tensor, kept in small buffers, and quantization parameters from them.
#pragma once

#include "arrays.h"

namespace fastquant {

// What observing does with NaN and infinities.
enum class NonFinite : int64_t { ignore = 0, raise = 1, propagate = 2 };

enum class Scheme : int64_t { affine = 0, symmetric = 1, float_qparams = 2 };

struct QParamsConfig {
  int64_t quant_min;
  int64_t quant_max;
  Scheme scheme;
  int64_t symmetric_zero_point;
};

// Whatever throws does so before any buffer has changed.
void observe_minmax(const Dense& x, const Array& min_val, const Array& max_val, const Array& nonfinite_count,
                    std::optional<double> averaging_constant, NonFinite policy);

void observe_histogram(const Dense& x, const Array& histogram, const Array& min_val, const Array& max_val,
                       const Array& nonfinite_count, int64_t upsample_rate, NonFinite policy);

// Writes one scale and zero point for each element of min_val.
void choose_qparams(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                    const Array& scale, const Array& zero_point);

// The range within [min_val, max_val] whose quantization loses least.
void search_histogram_range(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                            const Array& new_min, const Array& new_max);

}  // namespace fastquant
