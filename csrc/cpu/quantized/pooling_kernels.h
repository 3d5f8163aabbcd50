// The table of pooling kernels.
#pragma once

#include <cstdint>

namespace fastquant {

struct PoolingKernels {};

extern const PoolingKernels kPoolingScalar;

}  // namespace fastquant
