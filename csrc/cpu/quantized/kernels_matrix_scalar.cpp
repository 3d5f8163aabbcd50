#include "dot_scalar.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixScalar = matrix_table<ScalarDot>();

}  // namespace fastquant
