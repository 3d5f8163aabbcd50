#include "dot_avx512.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixAvx512 = widening_matrix_table<Avx512Dot>();

}  // namespace fastquant
