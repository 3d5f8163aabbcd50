#include "geometry.h"

#include <algorithm>

#include "../../memory.h"

namespace fastquant {
namespace {

// Numbers of a layer of `count` spatial dimensions, as the last of three.
void place(const SpatialSizes& given, int64_t count, int64_t otherwise, int64_t* out, const char* name) {
  check(given.count == count, name, " needs ", count, " values, has ", given.count);
  for (int d = 0; d < ConvShape::kDims; ++d) {
    const int64_t at = d - (ConvShape::kDims - count);
    out[d] = at < 0 ? otherwise : given.values[at];
  }
}

// What both kinds of convolution take in the same way; out is not set.
ConvShape shape_without_output(int64_t dims, const int64_t* sizes, const ConvArguments& arguments,
                               int64_t in_channels, int64_t out_channels) {
  const int64_t spatial = dims - 2;
  ConvShape shape;
  shape.batch = sizes[0], shape.in_channels = sizes[1];
  shape.out_channels = out_channels, shape.groups = arguments.groups;
  check(in_channels == sizes[1], "x has ", sizes[1], " channels, the weight needs ", in_channels);
  place({sizes + 2, spatial}, spatial, 1, shape.in, "x");
  place({arguments.weight_shape + 2, spatial}, spatial, 1, shape.kernel, "weight_shape");
  place(arguments.stride, spatial, 1, shape.stride, "stride");
  place(arguments.padding, spatial, 0, shape.padding, "padding");
  place(arguments.dilation, spatial, 1, shape.dilation, "dilation");
  for (int d = 0; d < ConvShape::kDims; ++d) {
    check(shape.stride[d] > 0 && shape.dilation[d] > 0 && shape.padding[d] >= 0 && shape.kernel[d] > 0,
          "stride, dilation and kernel sizes must be positive, padding not negative");
  }
  return shape;
}

void check_dims(int64_t dims, const ConvArguments& arguments) {
  check(3 <= dims && dims <= kMaxLayerDims, "x must have 3 to 5 dimensions, has ", dims);
  check(arguments.weight_dims == dims, "weight_shape needs ", dims, " values, has ", arguments.weight_dims);
}

}  // namespace

void channels_last_strides(int64_t dims, const int64_t* sizes, int64_t* strides) {
  int64_t stride = 1;
  const auto next = [&](int64_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  };
  next(1);
  for (int64_t d = dims - 1; d >= 2; --d) next(d);
  next(0);
}

bool has_channels_last(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t wanted[kMaxDims];
  channels_last_strides(dims, sizes, wanted);
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != wanted[d]) return false;
  }
  return true;
}

ConvShape conv_shape(int64_t dims, const int64_t* sizes, const ConvArguments& arguments) {
  check_dims(dims, arguments);
  const int64_t* const weight = arguments.weight_shape;
  ConvShape shape = shape_without_output(dims, sizes, arguments, weight[1] * arguments.groups, weight[0]);
  for (int d = 0; d < ConvShape::kDims; ++d) {
    const int64_t reach = shape.dilation[d] * (shape.kernel[d] - 1) + 1;
    const int64_t room = shape.in[d] + 2 * shape.padding[d] - reach;
    check(room >= 0, "the kernel reaches over ", reach, " positions, x has ",
          shape.in[d] + 2 * shape.padding[d], " with padding");
    shape.out[d] = room / shape.stride[d] + 1;
  }
  return shape;
}

ConvShape conv_transpose_shape(int64_t dims, const int64_t* sizes, const ConvArguments& arguments,
                               const SpatialSizes& output_padding) {
  check_dims(dims, arguments);
  const int64_t* const weight = arguments.weight_shape;
  ConvShape shape = shape_without_output(dims, sizes, arguments, weight[0], weight[1] * arguments.groups);
  int64_t more[ConvShape::kDims];
  place(output_padding, dims - 2, 0, more, "output_padding");
  for (int d = 0; d < ConvShape::kDims; ++d) {
    check(more[d] >= 0 && more[d] < std::max(shape.stride[d], shape.dilation[d]),
          "output_padding must be smaller than stride or dilation, and not negative");
    shape.out[d] = (shape.in[d] - 1) * shape.stride[d] - 2 * shape.padding[d] +
                   shape.dilation[d] * (shape.kernel[d] - 1) + more[d] + 1;
    check(shape.in[d] > 0 && shape.out[d] > 0, "there is no output: padding takes away more than x makes");
  }
  return shape;
}

void conv_output_sizes(const ConvShape& shape, int64_t dims, int64_t* sizes) {
  sizes[0] = shape.batch, sizes[1] = shape.out_channels;
  for (int64_t d = 2; d < dims; ++d) sizes[d] = shape.out[ConvShape::kDims - dims + d];
}

}  // namespace fastquant
