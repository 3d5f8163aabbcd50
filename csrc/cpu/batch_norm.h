// Batch norm, an activation that clamps, observing and fake-quantizing, on plain memory.
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// The parameters and running statistics of a batch norm, one element per channel, and what to do with them.
struct BatchNorm {
  Array weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;
};

// What follows the batch norm, beside the quantizer.
struct ClampSettings {
  double low, high;
};

// The fake-quantizer that follows; `observes` and `quantizes` are its flags.
struct ObservedQuantizer {
  FusedBuffers buffers;
  ObserveSettings settings;
  bool observes, quantizes;
};

struct QuantRange {
  int64_t min, max;
};

// The three functions are the ops observe_batch_norm_, batch_norm_fake_quantize and
// batch_norm_fake_quantize_backward (docs/architecture.md#ops). x has its channels in Dense::channels.
//
// norm: four values per channel in the type of the arithmetic; quantizer: three fp64 values. If it throws, it
// has not changed any buffer.
void observe_batch_norm(const Dense& x, const BatchNorm& batch_norm, const ClampSettings& clamp,
                        const ObservedQuantizer& observed, void* norm, double* quantizer);

void batch_norm_fake_quantize(const Dense& x, const Array& norm, const Array& quantizer,
                              const ClampSettings& clamp, const QuantRange& range, void* y);

// grad and grad_x lie as x does. training: whether the mean and the variance in `norm` are those of x.
void batch_norm_fake_quantize_backward(const Dense& x, const void* grad, const Array& norm,
                                       const Array& quantizer, bool training, const ClampSettings& clamp,
                                       const QuantRange& range, void* grad_x, const Array& grad_weight,
                                       const Array& grad_bias);

}  // namespace fastquant
