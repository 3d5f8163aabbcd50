#include "bytes_avx2.h"
#include "kernels/pooling-inl.h"

namespace fastquant {

extern const PoolingKernels kPoolingAvx2 = pooling_table<Avx2Bytes>();

}  // namespace fastquant
