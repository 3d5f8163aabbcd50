#include "bytes_scalar.h"
#include "kernels/norm-inl.h"

namespace fastquant {

extern const NormKernels kNormScalar = norm_table<ScalarBytes>();

}  // namespace fastquant
