// Weights folded with batch norm, on plain memory (math/folded_weight.h).
#pragma once

#include "../settings.h"
#include "arrays.h"

namespace fastquant {

// A Dense weight is viewed with its output channels, the first axis, as channels. The folded weight, and its
// gradient, lie in memory as the weight does; they may be narrower than a float32 weight.

// Observes and quantizes the products w s, as far as `observes` and `quantizes` say, and writes the folded
// weight and, in rows of one value per channel, the fields of ChannelFold to fold. If it throws, it has not
// changed any buffer.
void observe_folded_weight(const Dense& weight, const Array& bn_weight, const Array& bn_std,
                           const FusedBuffers& buffers, const ObserveSettings& settings, bool observes,
                           bool quantizes, const Array& folded, const Array& fold);

// Writes the folded weight that belongs to `fold`.
void fold_weight(const Dense& weight, const Array& fold, int64_t quant_min, int64_t quant_max,
                 const Array& folded);

// The gradients of the weight, and of bn_weight through s. grad_weight may be the memory of grad.
void fold_weight_backward(const Dense& weight, const Array& grad, const Array& fold, int64_t quant_min,
                          int64_t quant_max, void* grad_weight, const Array& grad_bn_weight);

}  // namespace fastquant
