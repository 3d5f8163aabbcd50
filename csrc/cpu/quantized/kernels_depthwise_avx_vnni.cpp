#include "kernels/depthwise-inl.h"
#include "taps_avx2.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseAvxVnni = depthwise_table<Avx2Taps>();

}  // namespace fastquant
