// Fake-quantize over memory: forward, straight-through backward, learnable parameters.
#pragma once

#include "arrays.h"

namespace fastquant {

// Elements of one word of a mask.
constexpr int64_t kMaskWord = 64;

inline int64_t mask_words(int64_t numel) { return (numel + kMaskWord - 1) / kMaskWord; }

// Writes x fake-quantized to y, and to mask, where it is not null, one bit an element:
// whether it was in the quantized range.
void fake_quantize(const Dense& x, const Array& scale, const Array& zero_point, int64_t quant_min,
                   int64_t quant_max, void* y, uint64_t* mask);

// Quantizes fp32 x to int8 with one scale a channel and zero points of zero.
void quantize_per_channel(const Dense& x, const Array& scale, int64_t quant_min, int64_t quant_max,
                          int8_t* out);

// Sets the mask of a tensor that is not fake-quantized: every gradient passes.
void fill_mask(uint64_t* mask, int64_t numel);

// Writes grad to out where the mask has a bit, zero elsewhere.
void mask_gradient(const Dense& grad, const uint64_t* mask, void* out);

// The integers in the quantized range that are nearest to learnable zero points.
std::vector<int64_t> whole_zero_points(const Array& zero_point, int64_t quant_min, int64_t quant_max);

// Gradients of fake-quantize for x, and for one scale and zero point a channel.
void learnable_backward(const Dense& x, const void* grad, const Array& scale, const Array& zero_point,
                        int64_t quant_min, int64_t quant_max, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point);

}  // namespace fastquant
