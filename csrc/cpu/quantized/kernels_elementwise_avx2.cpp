#include "bytes_avx2.h"
#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseAvx2 = elementwise_table<Avx2Bytes>();

}  // namespace fastquant
