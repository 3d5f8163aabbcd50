#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixScalar = matrix_table();

}  // namespace fastquant
