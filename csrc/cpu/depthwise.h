// Depthwise convolutions of square kernels and their gradients, on plain memory and in parallel. Images are
// [channels, rows, columns], one after the other; the weight is [channels, kernel, kernel]. The padding is half
// the kernel.
//
// Results have the same bits on every instruction set and with any number of threads.
#pragma once

#include "kernels.h"

namespace fastquant {

struct DepthwiseLayer {
  int64_t images, channels, height, width, kernel, stride;

  int64_t rows() const { return (height + stride - 1) / stride; }
  int64_t columns() const { return (width + stride - 1) / stride; }
};

// The following take fp32 or bf16. Sums are fp32, those over images fp64.

// `bias` may be null.
template <class S>
void depthwise_convolution(const DepthwiseLayer& layer, const S* x, const S* weight, const S* bias, S* y);

// The gradients of x, which may take the place of grad, and of the weight; either may be null. Where this
// throws, it has written nothing.
template <class S>
void depthwise_convolution_backward(const DepthwiseLayer& layer, const S* grad, const S* x, const S* weight,
                                    S* grad_x, S* grad_weight);

}  // namespace fastquant
