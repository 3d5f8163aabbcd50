#include "kernels/pooling-inl.h"

namespace fastquant {

extern const PoolingKernels kPoolingScalar = pooling_table();

}  // namespace fastquant
