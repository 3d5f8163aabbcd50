// Convolutions of 3x3 taps with stride 1 and a padding of 1, and their gradients, by Winograd's minimal
// filtering F(2x2, 3x3) (Lavin and Gray, https://arxiv.org/abs/1509.09308), on plain memory and in parallel.
// Images are [channels, rows, columns], one after the other, or the same in channels_last; the weight is
// [outputs, inputs, 3, 3].
//
// A tile of 2 x 2 outputs takes 16 products for each pair of channels instead of 36. Results have the same bits
// on every instruction set and with any number of threads.
//
// These functions return whether all results are finite. Only then are they those of a convolution: differences
// of infinite values are NaN, which a sum of products need not be.
#pragma once

#include <cstdint>

namespace fastquant {

struct WinogradLayer {
  int64_t images, inputs, outputs, height, width;
  bool channels_last;
};

// `bias` may be null.
[[nodiscard]] bool winograd_convolution(const WinogradLayer& layer, const float* x, const float* weight,
                                        const float* bias, float* y);

[[nodiscard]] bool winograd_grad_input(const WinogradLayer& layer, const float* grad, const float* weight,
                                       float* grad_x);

[[nodiscard]] bool winograd_grad_weight(const WinogradLayer& layer, const float* grad, const float* x,
                                        float* grad_weight);

}  // namespace fastquant
