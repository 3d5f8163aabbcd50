// Transposed convolutions on whole quantized tensors.
#pragma once

#include "convolution.h"

namespace fastquant {

// x: [batch, *in, in_channels], contiguous, as is the output, [batch, *out, out_channels]. packed: the weight
// [in_channels, out_channels / groups, *kernel] (packing.h).
void quantized_conv_transpose(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                              const LayerScales& scales, const OutputFormat& format);

}  // namespace fastquant
