#include "axes.h"

#include <algorithm>

namespace fastquant {
namespace {

Axis axis_of(const ConvShape& s, int d) {
  Axis axis = {{}, s.stride[d], s.in[d], s.out[d], 0, 1};
  for (int64_t k = 0; k < s.kernel[d]; ++k) axis.taps.push_back({k, k * s.dilation[d] - s.padding[d]});
  return axis;
}

// Output o gets what tap k makes of position i of x where o = i * stride - padding + k * dilation. For the
// outputs o = first + t * stride, these are the taps for which i = t + (first + padding - k * dilation) /
// stride is whole.
std::vector<Axis> axes_of_remainders(const ConvShape& s, int d) {
  std::vector<Axis> axes;
  const int64_t stride = s.stride[d];
  for (int64_t first = 0; first < std::min(stride, s.out[d]); ++first) {
    Axis axis = {{}, 1, s.in[d], (s.out[d] - first + stride - 1) / stride, first, stride};
    for (int64_t k = s.kernel[d] - 1; k >= 0; --k) {
      const int64_t distance = first + s.padding[d] - k * s.dilation[d];
      if (distance % stride == 0) axis.taps.push_back({k, distance / stride});
    }
    axes.push_back(axis);
  }
  return axes;
}

}  // namespace

Axes axes_of(const ConvShape& shape) { return {{axis_of(shape, 0), axis_of(shape, 1), axis_of(shape, 2)}}; }

std::vector<Axes> axes_of_transposed(const ConvShape& shape) {
  std::vector<Axes> parts;
  for (const Axis& z : axes_of_remainders(shape, 0)) {
    for (const Axis& y : axes_of_remainders(shape, 1)) {
      for (const Axis& x : axes_of_remainders(shape, 2)) parts.push_back({{z, y, x}});
    }
  }
  return parts;
}

}  // namespace fastquant
