// The table of matrix kernels.
#pragma once

#include <cstdint>

namespace fastquant {

struct MatrixKernels {};

extern const MatrixKernels kMatrixScalar;

}  // namespace fastquant
