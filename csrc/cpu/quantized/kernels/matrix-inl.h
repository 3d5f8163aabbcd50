// The bodies of the matrix kernels. Everything here is in an anonymous namespace, and std:: is not used: see
// ../../kernels-inl.h.
#pragma once

#include "../matrix_kernels.h"

namespace fastquant {
namespace {

constexpr MatrixKernels matrix_table() { return {}; }

}  // namespace
}  // namespace fastquant
