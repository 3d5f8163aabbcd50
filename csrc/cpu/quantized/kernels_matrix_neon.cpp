#include "dot_neon.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixNeon = matrix_table<NeonDot>();

}  // namespace fastquant
