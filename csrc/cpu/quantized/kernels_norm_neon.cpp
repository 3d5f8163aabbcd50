#include "bytes_neon.h"
#include "kernels/norm-inl.h"

namespace fastquant {

extern const NormKernels kNormNeon = norm_table<NeonBytes>();

}  // namespace fastquant
