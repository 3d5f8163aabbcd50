// The bodies of the depthwise kernels. Everything here is in an anonymous namespace, and std:: is not used: see
// ../../kernels-inl.h.
#pragma once

#include "../depthwise_kernels.h"

namespace fastquant {
namespace {

constexpr DepthwiseKernels depthwise_table() { return {}; }

}  // namespace
}  // namespace fastquant
