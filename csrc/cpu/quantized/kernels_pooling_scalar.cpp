#include "bytes_scalar.h"
#include "kernels/pooling-inl.h"

namespace fastquant {

extern const PoolingKernels kPoolingScalar = pooling_table<ScalarBytes>();

}  // namespace fastquant
