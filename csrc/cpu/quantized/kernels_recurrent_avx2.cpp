#include "../vec_avx2.h"
#include "kernels/recurrent-inl.h"

namespace fastquant {

extern const RecurrentKernels kRecurrentAvx2 = recurrent_table<Avx2<float>>();

}  // namespace fastquant
