#include "dot_neon.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixNeonDot = matrix_table<NeonDotProduct>();

}  // namespace fastquant
