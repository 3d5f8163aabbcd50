#include "bytes_avx512.h"
#include "kernels/pooling-inl.h"

namespace fastquant {

extern const PoolingKernels kPoolingAvx512 = pooling_table<Avx512Bytes>();

}  // namespace fastquant
