#include "kernels-inl.h"
#include "vec_scalar.h"

namespace fastquant {

extern const Kernels kScalarKernels = kernel_table<Scalar>("scalar");

}  // namespace fastquant
