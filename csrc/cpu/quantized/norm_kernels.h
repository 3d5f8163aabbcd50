// The table of kernels for normalizing. They work on matrices of bytes, rows of contiguous elements.
#pragma once

#include "elementwise_kernels.h"

namespace fastquant {

struct NormKernels {
  // Adds the sum and the sum of squares of each column to `sums` and `squares`.
  void (*moments_of_columns)(Rows<const uint8_t> x, int64_t rows, int64_t columns, uint8_t flip, int64_t* sums,
                             int64_t* squares);
  // Those of n contiguous elements.
  void (*moments)(const uint8_t* x, int64_t n, uint8_t flip, int64_t* sum, int64_t* square);

  // out[r][c] = ((x[r][c] - zero_point - center) * factor) * gain[c] + bias[c], each operation rounded, as an
  // output. The ratio of the operand is not used.
  void (*normalize)(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns,
                    const Operand& of_x, float center, float factor, const float* gain, const float* bias,
                    const Output& output);
};

extern const NormKernels kNormScalar;
extern const NormKernels kNormAvx2;
extern const NormKernels kNormAvx512;
extern const NormKernels kNormNeon;

}  // namespace fastquant
