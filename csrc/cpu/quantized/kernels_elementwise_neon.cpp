#include "bytes_neon.h"
#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseNeon = elementwise_table<NeonBytes>();

}  // namespace fastquant
