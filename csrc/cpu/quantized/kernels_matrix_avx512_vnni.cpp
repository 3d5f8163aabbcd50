#include "dot_avx512.h"
#include "kernels/matrix-inl.h"

namespace fastquant {

extern const MatrixKernels kMatrixAvx512Vnni = matrix_table<Avx512VnniDot>();

}  // namespace fastquant
