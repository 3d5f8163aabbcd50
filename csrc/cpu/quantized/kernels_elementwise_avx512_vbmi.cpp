#include "bytes_avx512_vbmi.h"
#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseAvx512Vbmi = elementwise_table<Avx512VbmiBytes>();

}  // namespace fastquant
