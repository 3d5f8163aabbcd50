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
  const int64_t spatial = dims - 2;
  check(1 <= spatial && spatial <= ConvShape::kDims, "x must have 3 to 5 dimensions, has ", dims);
  check(arguments.weight_dims == dims, "weight_shape needs ", dims, " values, has ", arguments.weight_dims);
  const int64_t* const weight = arguments.weight_shape;
  ConvShape shape;
  shape.batch = sizes[0], shape.in_channels = sizes[1];
  shape.out_channels = weight[0], shape.groups = arguments.groups;
  check(weight[1] * shape.groups == sizes[1], "x has ", sizes[1], " channels, the weight needs ",
        weight[1] * shape.groups);
  place({sizes + 2, spatial}, spatial, 1, shape.in, "x");
  place({weight + 2, spatial}, spatial, 1, shape.kernel, "weight_shape");
  place(arguments.stride, spatial, 1, shape.stride, "stride");
  place(arguments.padding, spatial, 0, shape.padding, "padding");
  place(arguments.dilation, spatial, 1, shape.dilation, "dilation");
  for (int d = 0; d < ConvShape::kDims; ++d) {
    check(shape.stride[d] > 0 && shape.dilation[d] > 0 && shape.padding[d] >= 0 && shape.kernel[d] > 0,
          "stride, dilation and kernel sizes must be positive, padding not negative");
    const int64_t reach = shape.dilation[d] * (shape.kernel[d] - 1) + 1;
    const int64_t room = shape.in[d] + 2 * shape.padding[d] - reach;
    check(room >= 0, "the kernel reaches over ", reach, " positions, x has ",
          shape.in[d] + 2 * shape.padding[d], " with padding");
    shape.out[d] = room / shape.stride[d] + 1;
  }
  return shape;
}

void conv_output_sizes(const ConvShape& shape, int64_t dims, int64_t* sizes) {
  sizes[0] = shape.batch, sizes[1] = shape.out_channels;
  for (int64_t d = 2; d < dims; ++d) sizes[d] = shape.out[ConvShape::kDims - dims + d];
}

}  // namespace fastquant
