// Linear layers and convolutions on whole quantized tensors: matrix products of the values around each output
// position with packed weights.
#pragma once

#include <cstdint>

#include "output.h"

namespace fastquant {

// a / b, rounded towards negative infinity; b is positive.
static inline constexpr int64_t floor_divided(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// A convolution in up to three spatial dimensions; absent ones, which come first, have a size of 1.
struct ConvShape {
  static constexpr int kDims = 3;
  int64_t batch;
  int64_t in_channels, out_channels, groups;
  int64_t in[kDims], out[kDims];
  int64_t kernel[kDims], stride[kDims], padding[kDims], dilation[kDims];

  int64_t positions() const { return batch * out[0] * out[1] * out[2]; }
};

// x: [batch, *in, in_channels], contiguous, as is the output, [batch, *out, out_channels]. packed: the weight
// [out_channels, in_channels / groups, *kernel] (packing.h).
void quantized_conv(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                    const LayerScales& scales, const OutputFormat& format);

// x: [rows, in_features], contiguous, as is the output, [rows, out_features].
void quantized_linear(const QuantizedValues& x, int64_t rows, int64_t in_features, int64_t out_features,
                      const uint8_t* packed, const LayerScales& scales, const OutputFormat& format);

}  // namespace fastquant
