// Updates observers' statistics from a tensor, and computes quantization parameters from statistics.
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// If one of these functions throws, it has not changed any buffer.
void observe_minmax(const Dense& x, const Array& min_val, const Array& max_val, const Array& nonfinite_count,
                    std::optional<double> averaging_constant, NonFinite policy);

// Updates the buffers as if x were observed `times` times in succession.
void observe_histogram(const Dense& x, const Array& histogram, const Array& min_val, const Array& max_val,
                       const Array& nonfinite_count, int64_t upsample_rate, NonFinite policy, int64_t times);

// The same with a histogram of its own for each channel: as many rows of bins as min_val has elements.
void observe_channel_histograms(const Dense& x, const Array& histogram, const Array& min_val,
                                const Array& max_val, const Array& nonfinite_count, int64_t upsample_rate,
                                NonFinite policy);

// Writes one scale and zero point for each element of min_val.
void choose_qparams(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                    const Array& scale, const Array& zero_point);

// Calls observe_minmax and then choose_qparams with the updated range.
void observe_qparams(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings);

}  // namespace fastquant
