// Convolutions with kernels of one element ("pointwise", 1x1) and their gradients, on plain memory
// and in parallel. Images are [channels, positions], one after the other; the weight is [outputs, inputs].
//
// Results have the same bits on every instruction set and with any number of threads.
#pragma once

#include <cstdint>

namespace fastquant {

struct Pointwise {
  int64_t images, inputs, outputs, positions;
};

// The following take fp32 or bf16. Sums are fp32.

// y = weight x + bias. `bias` may be null.
template <class S>
void pointwise_convolution(const Pointwise& sizes, const S* x, const S* weight, const S* bias, S* y);

// grad_x = weight' grad
template <class S>
void pointwise_grad_input(const Pointwise& sizes, const S* grad, const S* weight, S* grad_x);

// grad_weight = grad x', summed over the images.
template <class S>
void pointwise_grad_weight(const Pointwise& sizes, const S* grad, const S* x, S* grad_weight);

// The same for images in channels_last.
void pointwise_convolution_channels_last(const Pointwise& sizes, const float* x, const float* weight,
                                         const float* bias, float* y);
void pointwise_grad_input_channels_last(const Pointwise& sizes, const float* grad, const float* weight,
                                        float* grad_x);
void pointwise_grad_weight_channels_last(const Pointwise& sizes, const float* grad, const float* x,
                                         float* grad_weight);

}  // namespace fastquant
