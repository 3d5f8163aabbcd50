#include "kernels/depthwise-inl.h"
#include "taps_neon.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseNeonDot = depthwise_table<NeonTaps>();

}  // namespace fastquant
