// Kernels that multiply matrices of bf16 by tiles, for the convolutions of tiled_convolution.h.
#pragma once

#include <cstdint>

#include "../math/numbers.h"

namespace fastquant {

// Matrices are cut into blocks of so many rows of sums, or columns, and of so many factors in a sum.
constexpr int64_t kTileSide = 16, kTileDepth = 32;

// A part of a convolution. An output at position p is the sum, over inner blocks and taps, of the products of a
// block of weights and the inputs at p + offsets[tap].
struct TileProduct {
  const BFloat16* weight;  // [outer blocks, inner blocks, taps, kTileSide, kTileDepth]
  const uint32_t* x;       // pairs of channels, in rows of positions that begin pair_stride apart
  const int64_t* offsets;
  int64_t taps, inner_blocks, pair_stride;
  int64_t positions;  // a multiple of two blocks
  float* y;           // rows of positions that begin y_stride apart
  int64_t y_stride;
};

// A part of the gradient of a weight: sums[tap, o, i] += the products of grad[o, p - offsets[tap]] and x[p, i],
// over all positions p.
struct TileSums {
  const BFloat16* grad;  // rows of positions that begin grad_stride apart
  int64_t grad_stride;
  const uint32_t* x;  // pairs of positions, in rows of channels that begin x_stride apart
  int64_t x_stride;
  const int64_t* offsets;
  int64_t taps;
  int64_t positions;  // a multiple of kTileDepth
  float* sums;        // [taps, 2 * kTileSide, 2 * kTileSide]
};

struct TileKernels {
  // The products of one or two outer blocks.
  void (*product)(const TileProduct& p, int64_t outer_blocks);

  // Two outer blocks and two of channels.
  void (*sums)(const TileSums& s);

  // Pairs of neighbouring rows of x, which begin x_stride apart: the first one's elements in the lower bits. A
  // row of x is `lines` lines of `width` elements, which in y begin line_stride apart. A row that is missing is
  // zeros.
  void (*pair_rows)(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t lines, int64_t width,
                    uint32_t* y, int64_t y_stride, int64_t line_stride);

  // The same rows as they are.
  void (*place_rows)(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t lines, int64_t width,
                     BFloat16* y, int64_t y_stride, int64_t line_stride);

  // y[c, r] = x[r, c]. The numbers of rows and columns are multiples of 16.
  void (*transpose)(const uint32_t* x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t* y,
                    int64_t y_stride);

  // y = x + bias, for lines of `width` elements, which in x begin line_stride apart. Whether all are finite.
  bool (*narrow)(const float* x, int64_t line_stride, int64_t lines, int64_t width, float bias, BFloat16* y);

  // y[i, tap] = sums[tap, i], for i below `channels`, of which there are at most two blocks. From tap to tap,
  // sums are sums_stride apart. There are 1 or 9 taps. Whether all are finite.
  bool (*interleave)(const float* sums, int64_t sums_stride, int64_t taps, int64_t channels, BFloat16* y);
};

extern const TileKernels kTileKernelsAmx;

}  // namespace fastquant
