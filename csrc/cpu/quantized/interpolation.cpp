#include "interpolation.h"

#include <cstring>

#include "../arrays.h"
#include "kernels.h"
#include "pooling_kernels.h"
#include "quantization.h"

namespace fastquant {
namespace {

// Which pixels each output takes along one dimension: two, with weights that add up to 1, or only the left.
struct Places {
  std::vector<int64_t> left, right;
  std::vector<float> left_weights, right_weights;
  int64_t count = 1;  // of pixels
};

Places places_of(const Resizing& r, int k) {
  Places p;
  const int64_t last = r.sizes[k] - 1;
  const bool linear = r.mode == Interpolation::linear && k >= r.first;
  if (linear) p.count = 2;
  for (int64_t i = 0; i < r.outputs[k]; ++i) {
    int64_t left, right;
    double part = 0.0;
    if (linear) {
      const double at = static_cast<double>(i);
      const double place = r.align_corners ? at * r.ratios[k] : std::max((at + 0.5) * r.ratios[k] - 0.5, 0.0);
      left = std::min(static_cast<int64_t>(place), last);
      right = std::min(left + 1, last);
      part = std::min(std::max(place - static_cast<double>(left), 0.0), 1.0);
    } else {
      // In fp32, as torch finds them.
      const float at = static_cast<float>(i) + (r.mode == Interpolation::nearest_exact ? 0.5f : 0.0f);
      left = right = std::min(static_cast<int64_t>(at * static_cast<float>(r.ratios[k])), last);
    }
    p.left.push_back(left);
    p.right.push_back(right);
    p.left_weights.push_back(static_cast<float>(1.0 - part));
    p.right_weights.push_back(static_cast<float>(part));
  }
  return p;
}

}  // namespace

void interpolate(const Images& x, const Resizing& resizing, uint8_t* out) {
  Places places[kPoolDims];
  for (int k = 0; k < kPoolDims; ++k) places[k] = places_of(resizing, k);
  const Places &depth = places[0], &height = places[1], &width = places[2];
  const int64_t deep = resizing.outputs[0], high = resizing.outputs[1], wide = resizing.outputs[2];
  const int64_t rows = x.count * deep * high, bytes = wide * x.channels;
  if (rows * bytes == 0) return;
  const bool linear = resizing.mode == Interpolation::linear;
  const int64_t pieces = std::min(piece_count(rows * bytes), rows);
  for_pieces(rows, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % high, d = row / high % deep;
      const uint8_t* const image = x.data + row / high / deep * x.image_stride;
      const uint8_t* lines[4];
      float weights[4];
      int count = 0;
      for (int z = 0; z < depth.count; ++z) {
        const uint8_t* const plane = image + (z == 0 ? depth.left : depth.right)[d] * x.strides[0];
        const float of_plane = (z == 0 ? depth.left_weights : depth.right_weights)[d];
        for (int y = 0; y < height.count; ++y) {
          lines[count] = plane + (y == 0 ? height.left : height.right)[h] * x.strides[1];
          weights[count++] = of_plane * (y == 0 ? height.left_weights : height.right_weights)[h];
        }
      }
      uint8_t* const to = out + row * bytes;
      if (linear) {
        quantized_kernels().pooling->interpolate({lines, weights, count, width.left.data(), width.right.data(),
                                                  width.left_weights.data(), width.right_weights.data(),
                                                  x.strides[2], x.channels, to, wide, flip_of(x.is_signed)});
      } else {
        for (int64_t i = 0; i < wide; ++i) {
          std::memcpy(to + i * x.channels, lines[0] + width.left[i] * x.strides[2],
                      static_cast<size_t>(x.channels));
        }
      }
    }
  });
}

}  // namespace fastquant
