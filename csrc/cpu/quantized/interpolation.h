// Images of quantized values in other sizes, on plain memory and in parallel. Scale and zero point stay.
#pragma once

#include "images.h"

namespace fastquant {

enum class Interpolation : int64_t { nearest, nearest_exact, linear };

// From `sizes` to `outputs` pixels along the dimensions from the `first` on. ratios: how many pixels of the
// input one of the output stands for. The output lies in memory as [images, depth, height, width, channels].
struct Resizing {
  Interpolation mode;
  bool align_corners;  // of linear interpolation
  int first;
  int64_t sizes[kPoolDims], outputs[kPoolDims];
  double ratios[kPoolDims];
};

void interpolate(const Images& x, const Resizing& resizing, uint8_t* out);

}  // namespace fastquant
