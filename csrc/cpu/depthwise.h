// DepthwiseLayer convolutions of whole tensors in plain memory, images by channels by rows by columns, in
// parallel.
#pragma once

#include "kernels.h"

namespace fastquant {

struct DepthwiseLayer {
  int64_t images, channels, height, width, kernel, stride;

  int64_t rows() const { return (height + stride - 1) / stride; }
  int64_t columns() const { return (width + stride - 1) / stride; }
};

// S: float or BFloat16. weight: the kernels, bias: null or a value for each channel.
template <class S>
void depthwise_convolution(const DepthwiseLayer& layer, const S* x, const float* weight, const float* bias,
                           S* y);

// The gradients of x, which may take the place of grad, and of the weight; either may be null.
template <class S>
void depthwise_convolution_backward(const DepthwiseLayer& layer, const S* grad, const S* x, const float* weight,
                                    S* grad_x, float* grad_weight);

}  // namespace fastquant
