// The clamped sum of two tensors on plain memory: observed, and fake-quantized or not.
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// Does with the clamped sum what observe_qparams does with a tensor. Throws before it changes any buffer.
void observe_clamped_sum(const SumOfTensors& x, const FusedBuffers& buffers, const ObserveSettings& settings);

// Writes the fake-quantized sum to y. If mask is not null, sets an element's bit if its sum was inside the
// bounds and in the quantized range, and clears it otherwise.
void fake_quantize_clamped_sum(const SumOfTensors& x, const Array& scale, const Array& zero_point,
                               int64_t quant_min, int64_t quant_max, void* y, uint64_t* mask);

// Calls observe_clamped_sum, then fake_quantize_clamped_sum with the scale and zero point that it has chosen.
void observe_fake_quantize_clamped_sum(const SumOfTensors& x, const FusedBuffers& buffers,
                                       const ObserveSettings& settings, void* y, uint64_t* mask);

// Writes the clamped sum, not fake-quantized, to y, and its mask.
void clamped_sum(const SumOfTensors& x, void* y, uint64_t* mask);

}  // namespace fastquant
