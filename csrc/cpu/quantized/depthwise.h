// Depthwise convolutions, in which each output channel is computed from one input channel.
#pragma once

#include "convolution.h"

namespace fastquant {

// As quantized_conv, for as many groups as input channels. packed: the weight in the depthwise layout
// (packing.h).
void depthwise_conv(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                    const LayerScales& scales, const OutputFormat& format);
void depthwise_conv_transpose(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                              const LayerScales& scales, const OutputFormat& format);

}  // namespace fastquant
