#include "kernels/depthwise-inl.h"
#include "taps_avx512.h"

namespace fastquant {

extern const DepthwiseKernels kDepthwiseAvx512Vnni = depthwise_table<Avx512Taps>();

}  // namespace fastquant
