// The matrix kernels for AMX.
#pragma once

#include "matrix_kernels.h"

namespace fastquant {

// By tiles, where they are worth their set-up and would not be nearly empty; else as kMatrixAvx512Vnni.
extern const MatrixKernels kMatrixAvx512Amx;

constexpr int64_t kFewestTileRows = 8, kFewestTileSteps = 3;

// Rows may have no segments: in a transposed convolution, outputs that no tap of the kernel meets.
static inline bool fits_tiles(const MatrixRows& rows, const MatrixWeights& weights) {
  const int64_t steps = weights.first_steps != nullptr ? rows.steps : rows.segments * rows.steps;
  return rows.rows >= kFewestTileRows && rows.segments > 0 && steps >= kFewestTileSteps;
}

}  // namespace fastquant
