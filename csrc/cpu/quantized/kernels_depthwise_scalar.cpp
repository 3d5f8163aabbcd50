#include "kernels/depthwise-inl.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseScalar = depthwise_table();

}  // namespace fastquant
