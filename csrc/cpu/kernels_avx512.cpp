#include "kernels-inl.h"
#include "vec_avx512.h"

namespace fastquant {

extern const Kernels kAvx512Kernels = kernel_table<Avx512>("avx512");

}  // namespace fastquant
