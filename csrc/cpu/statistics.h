// Statistics of a tensor, kept in small buffers, and quantization parameters from them.
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// Whatever throws does so before any buffer has changed.
void observe_minmax(const Dense& x, const Array& min_val, const Array& max_val, const Array& nonfinite_count,
                    std::optional<double> averaging_constant, NonFinite policy);

// As `times` observations of x, one after the other, would leave the buffers.
void observe_histogram(const Dense& x, const Array& histogram, const Array& min_val, const Array& max_val,
                       const Array& nonfinite_count, int64_t upsample_rate, NonFinite policy, int64_t times);

// Writes one scale and zero point for each element of min_val.
void choose_qparams(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                    const Array& scale, const Array& zero_point);

// observe_minmax, then choose_qparams from the new range.
void observe_qparams(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings);

// The range within [min_val, max_val] whose quantization loses least.
void search_histogram_range(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                            const Array& new_min, const Array& new_max);

}  // namespace fastquant
