#include "../vec_neon.h"
#include "kernels/recurrent-inl.h"

namespace fastquant {

extern const RecurrentKernels kRecurrentNeon = recurrent_table<Neon<float>>();

}  // namespace fastquant
