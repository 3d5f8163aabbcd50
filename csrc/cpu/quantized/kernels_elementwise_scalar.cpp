#include "bytes_scalar.h"
#include "kernels/elementwise-inl.h"

namespace fastquant {

extern const ElementwiseKernels kElementwiseScalar = elementwise_table<ScalarBytes>();

}  // namespace fastquant
