#include "dot_avx2.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixAvx2 = widening_matrix_table<Avx2Dot>();

}  // namespace fastquant
