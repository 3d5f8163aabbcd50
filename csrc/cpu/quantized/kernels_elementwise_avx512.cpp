#include "bytes_avx512.h"
#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseAvx512 = elementwise_table<Avx512Bytes>();

}  // namespace fastquant
