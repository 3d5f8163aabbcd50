// Convolutions of bf16 with 1x1 or 3x3 taps, stride 1 and a padding of half the kernel, and their gradients, by
// products of tiles (tile_kernels.h), on plain memory and in parallel. Images are [channels, rows, columns],
// one after the other; the weight is [outputs, inputs, taps]. For processors with AMX.
//
// Sums are fp32. Results have the same bits with any number of threads. Values and sums below 2^-126 count as
// zero.
//
// These functions return whether all results are finite. Only then are they those of a convolution: around
// images there are zeros, whose product with an infinite number is NaN.
#pragma once

#include <cstdint>

#include "../math/numbers.h"

namespace fastquant {

struct TiledLayer {
  int64_t images, inputs, outputs, height, width;
  int64_t kernel;  // 1 or 3
};

// Whether the instruction set in use has tiles.
bool has_tiles();

// `bias` may be null.
[[nodiscard]] bool tiled_convolution(const TiledLayer& layer, const BFloat16* x, const BFloat16* weight,
                                     const BFloat16* bias, BFloat16* y);

[[nodiscard]] bool tiled_grad_input(const TiledLayer& layer, const BFloat16* grad, const BFloat16* weight,
                                    BFloat16* grad_x);

[[nodiscard]] bool tiled_grad_weight(const TiledLayer& layer, const BFloat16* grad, const BFloat16* x,
                                     BFloat16* grad_weight);

}  // namespace fastquant
