// The table of elementwise kernels.
#pragma once

#include <cstdint>

namespace fastquant {

struct ElementwiseKernels {};

extern const ElementwiseKernels kElementwiseScalar;

}  // namespace fastquant
