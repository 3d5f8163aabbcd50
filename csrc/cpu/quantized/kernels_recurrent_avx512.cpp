#include "../vec_avx512.h"
#include "kernels/recurrent-inl.h"

namespace fastquant {

extern const RecurrentKernels kRecurrentAvx512 = recurrent_table<Avx512<float>>();

}  // namespace fastquant
