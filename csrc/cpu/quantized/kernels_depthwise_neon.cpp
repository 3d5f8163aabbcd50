#include "kernels/depthwise-inl.h"
#include "taps_neon.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseNeon = depthwise_table<NeonTaps>();

}  // namespace fastquant
