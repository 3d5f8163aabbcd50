// The positions that a convolution meets along one dimension. Both kinds of convolution are described so: a
// transposed one is as many ordinary ones as its stride, each of which computes the outputs whose positions
// have the same remainder, from the taps that meet them. No product with the zeros is computed that are, in
// textbooks, put between the elements of x.
#pragma once

#include <cstdint>
#include <vector>

#include "convolution.h"

namespace fastquant {

struct Axis {
  struct Tap {
    int64_t index;   // in the kernel
    int64_t offset;  // of the position of x that it reads: output i reads i * stride + offset
  };
  std::vector<Tap> taps;  // by ascending offset; offsets are equally far apart
  int64_t stride;
  int64_t in;           // positions of x
  int64_t count;        // of outputs
  int64_t first, step;  // output i is at first + i * step

  int64_t dilation() const { return taps.size() > 1 ? taps[1].offset - taps[0].offset : 1; }
};

struct Axes {
  Axis dims[ConvShape::kDims];

  int64_t positions(int64_t batch) const { return batch * dims[0].count * dims[1].count * dims[2].count; }
  int64_t taps() const {
    return static_cast<int64_t>(dims[0].taps.size() * dims[1].taps.size() * dims[2].taps.size());
  }
};

// Of an ordinary convolution.
Axes axes_of(const ConvShape& shape);
// Of a transposed convolution: all its parts.
std::vector<Axes> axes_of_transposed(const ConvShape& shape);

}  // namespace fastquant
