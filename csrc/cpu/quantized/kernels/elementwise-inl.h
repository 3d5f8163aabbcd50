// The bodies of the elementwise kernels. Everything here is in an anonymous namespace, and std:: is not used:
// see
// ../../kernels-inl.h.
#pragma once

#include "../elementwise_kernels.h"

namespace fastquant {
namespace {

constexpr ElementwiseKernels elementwise_table() { return {}; }

}  // namespace
}  // namespace fastquant
