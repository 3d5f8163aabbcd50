#include "bytes_avx512.h"
#include "kernels/norm-inl.h"

namespace fastquant {

extern const NormKernels kNormAvx512 = norm_table<Avx512Bytes>();

}  // namespace fastquant
