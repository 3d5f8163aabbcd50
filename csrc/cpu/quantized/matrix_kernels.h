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
};

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
