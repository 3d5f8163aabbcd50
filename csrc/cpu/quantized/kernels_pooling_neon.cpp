#include "bytes_neon.h"
#include "kernels/pooling-inl.h"

namespace fastquant {

extern const PoolingKernels kPoolingNeon = pooling_table<NeonBytes>();

}  // namespace fastquant
