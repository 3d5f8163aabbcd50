// Fake-quantize on plain memory: forward, straight-through backward, and learnable parameters.
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// A mask has one bit per element, in 64-bit words.
constexpr int64_t kMaskWord = 64;

inline int64_t mask_words(int64_t numel) { return (numel + kMaskWord - 1) / kMaskWord; }

// Writes the fake-quantized x to y. If mask is not null, sets an element's bit if it was in the quantized range
// and clears it otherwise.
void fake_quantize(const Dense& x, const Array& scale, const Array& zero_point, int64_t quant_min,
                   int64_t quant_max, void* y, uint64_t* mask);

// Calls observe_qparams, then fake_quantize with the scale and zero point that it has chosen. Throws before it
// changes any buffer.
void observe_fake_quantize(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings,
                           void* y, uint64_t* mask);

// Quantizes float32 x to int8 with one scale per channel and zero points of zero.
void quantize_per_channel(const Dense& x, const Array& scale, int64_t quant_min, int64_t quant_max,
                          int8_t* out);

// Sets all bits of the mask, for a tensor that was not fake-quantized: its whole gradient is kept.
void fill_mask(uint64_t* mask, int64_t numel);

// Writes grad to out, multiplied by 1 where the bit of the mask is set and by 0 elsewhere.
void mask_gradient(const Dense& grad, const uint64_t* mask, void* out);

// Learnable zero points, rounded to integers and clamped to the quantized range.
std::vector<int64_t> whole_zero_points(const Array& zero_point, int64_t quant_min, int64_t quant_max);

// The gradients of fake-quantize with respect to x and to one learnable scale and zero point per channel.
void learnable_backward(const Dense& x, const void* grad, const Array& scale, const Array& zero_point,
                        int64_t quant_min, int64_t quant_max, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point);

}  // namespace fastquant
