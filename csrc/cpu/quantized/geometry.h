// The shapes and memory layouts of layers on quantized tensors, without torch: for their ops, and for calls
// that skip torch's dispatcher.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace fastquant {

// The dimensions of a tensor that a convolution takes: [batch, channels, *spatial].
constexpr int64_t kMaxLayerDims = 2 + ConvShape::kDims;

// Strides of [batch, channels, *spatial] with the channels last.
void channels_last_strides(int64_t dims, const int64_t* sizes, int64_t* strides);
bool has_channels_last(int64_t dims, const int64_t* sizes, const int64_t* strides);

// One number for each spatial dimension.
struct SpatialSizes {
  const int64_t* values;
  int64_t count;
};

struct ConvArguments {
  // [out_channels, in_channels / groups, *kernel]; transposed: [in_channels, out_channels / groups, *kernel]
  const int64_t* weight_shape;
  int64_t weight_dims;
  SpatialSizes stride, padding, dilation;
  int64_t groups;
};

// A convolution of a tensor of these sizes; throws where the arguments do not fit it.
ConvShape conv_shape(int64_t dims, const int64_t* sizes, const ConvArguments& arguments);
ConvShape conv_transpose_shape(int64_t dims, const int64_t* sizes, const ConvArguments& arguments,
                               const SpatialSizes& output_padding);

// The sizes of what a convolution of a tensor of `dims` dimensions returns.
void conv_output_sizes(const ConvShape& shape, int64_t dims, int64_t* sizes);

}  // namespace fastquant
