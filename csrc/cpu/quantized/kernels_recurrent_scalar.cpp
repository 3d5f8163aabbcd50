#include "../vec_scalar.h"
#include "kernels/recurrent-inl.h"

namespace fastquant {

extern const RecurrentKernels kRecurrentScalar = recurrent_table<Scalar<float>>();

}  // namespace fastquant
