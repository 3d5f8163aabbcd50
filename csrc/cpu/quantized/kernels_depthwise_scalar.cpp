#include "kernels/depthwise-inl.h"
#include "taps_scalar.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseScalar = depthwise_table<ScalarTaps>();

}  // namespace fastquant
