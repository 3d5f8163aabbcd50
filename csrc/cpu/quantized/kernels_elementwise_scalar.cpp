#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseScalar = elementwise_table();

}  // namespace fastquant
