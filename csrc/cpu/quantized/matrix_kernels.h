// The table of matrix kernels.
#pragma once

#include <cstdint>

#include "output.h"

namespace fastquant {

// Rows of values, each in segments of `steps` times four values, of which the memory is contiguous. Segment s
// of row r starts `offset` bytes after pointers[s * stride + r].
struct MatrixRows {
  const uint8_t* const* pointers;
  int64_t offset;
  int64_t stride;
  int64_t rows;
  int64_t segments;
  int64_t steps;
};

// Rows of values that are equally spaced, in stretches of as many rows. Segment s of row r of stretch t starts
// at first + t * stretch_stride + r * row_stride + s * segment_stride, and has `steps` times four values;
// weights of values that a row of a kernel does not have are 0. Of every `line` rows of a stretch, the first
// `kept` have outputs, which follow each other; the others lie between the lines of an image.
struct EvenRows {
  const uint8_t* first;
  int64_t stretches, stretch_stride;
  int64_t rows, row_stride;
  int64_t segments, segment_stride;
  int64_t steps;
  int64_t line, kept;
};

// Packed weights of a group (packing.h). Segment s of the rows meets the steps from first_steps[s] on, or,
// where first_steps is null, those that follow the ones of the segment before.
struct MatrixWeights {
  const int8_t* data;
  int64_t channels;
  int64_t steps;
  const int64_t* first_steps;
};

struct MatrixKernels {
  // What kernels subtract from each value of the rows. They do not tell the output stage: its offsets are those
  // of values that have been made smaller so.
  int64_t value_offset;

  // Bytes of memory that `multiply`, or `multiply_groups`, needs for rows and weights of so many steps.
  int64_t (*scratch_size)(int64_t steps, bool in_groups);

  // The outputs of all rows, for the channels of the blocks [begin, end).
  void (*multiply)(const MatrixRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
                   const OutputStage& out, void* scratch);

  // The same for groups of `channels` input and as many output channels, whose number shares_blocks accepts.
  // Rows point at the first channel of all groups, and have the steps of one group. The weights are those of
  // all groups, as if these were one group of packed weights. Null where groups are multiplied one by one.
  void (*multiply_groups)(const MatrixRows& rows, const MatrixWeights& weights, int64_t channels, int64_t begin,
                          int64_t end, const OutputStage& out, void* scratch) = nullptr;

  // The same for rows that fits_even_rows accepts. Null where `multiply` does as well.
  void (*multiply_even)(const EvenRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
                        const OutputStage& out) = nullptr;

  // Another table, which may be faster for some layers, and has the same value_offset; null where there is
  // none. See measured_matrix.h.
  const MatrixKernels* other = nullptr;
};

// Steps of segments as tiles have them, as many as can be, at most 16, so that segments consist of whole tiles;
// 0 if these would be nearly empty.
static inline int64_t even_tile_steps(int64_t steps) {
  const int64_t fewest = (steps + 15) / 16;
  if (fewest == 0) return 0;  // of layers without input channels
  for (int64_t tiles = fewest; tiles <= fewest + fewest / 3; ++tiles) {
    if (steps % tiles == 0 && steps / tiles >= 3) return steps / tiles;
  }
  return 0;
}
// `rows` of a stretch. Kernels have room for so many tiles of steps.
constexpr int64_t kMostStepTiles = 512;
static inline bool fits_even_rows(int64_t rows, int64_t segments, int64_t steps) {
  const int64_t of_tile = even_tile_steps(steps);
  return rows >= 8 && of_tile > 0 && segments * (steps / of_tile) <= kMostStepTiles;
}

// Whether so many groups of so many input and output channels can be multiplied together.
static inline bool shares_blocks(int64_t groups, int64_t in_channels, int64_t out_channels) {
  const bool width = out_channels == 4 || out_channels == 8 || out_channels == 16;
  return groups > 1 && width && in_channels == out_channels && groups * out_channels % 16 == 0;
}

// How work is cut for the kernels: products that a thread must have to compute for its start to pay off; bytes
// to read and write at once, which stay in the L2 cache; a number of rows that all tiles divide; and pointers
// to rows at once.
constexpr int64_t kProductsOfThread = 390000, kSecondCache = 262144, kRowUnit = 24, kMostPointers = 8192;

extern const MatrixKernels kMatrixScalar;
extern const MatrixKernels kMatrixAvx2;
extern const MatrixKernels kMatrixAvxVnni;
extern const MatrixKernels kMatrixAvx512;
extern const MatrixKernels kMatrixAvx512Vnni;
extern const MatrixKernels kMatrixNeon;
extern const MatrixKernels kMatrixNeonDot;

}  // namespace fastquant
