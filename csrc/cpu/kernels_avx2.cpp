#include "kernels-inl.h"
#include "vec_avx2.h"

namespace fastquant {

extern const Kernels kAvx2Kernels = kernel_table<Avx2>("avx2");

}  // namespace fastquant
