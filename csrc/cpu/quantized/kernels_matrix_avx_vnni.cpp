#include "dot_avx2.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixAvxVnni = matrix_table<AvxVnniDot>();

}  // namespace fastquant
