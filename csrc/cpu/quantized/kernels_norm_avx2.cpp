#include "bytes_avx2.h"
#include "kernels/norm-inl.h"

namespace fastquant {

extern const NormKernels kNormAvx2 = norm_table<Avx2Bytes>();

}  // namespace fastquant
