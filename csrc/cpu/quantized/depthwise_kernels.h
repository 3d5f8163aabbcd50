// The table of depthwise kernels.
#pragma once

#include <cstdint>

namespace fastquant {

struct DepthwiseKernels {};

extern const DepthwiseKernels kDepthwiseScalar;

}  // namespace fastquant
