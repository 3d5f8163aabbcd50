#include "kernels-inl.h"
#include "vec_neon.h"

namespace fastquant {

extern const Kernels kNeonKernels = kernel_table<Neon>("neon");

}  // namespace fastquant
