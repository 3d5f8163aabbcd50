// The bodies of the pooling kernels. Everything here is in an anonymous namespace, and std:: is not used: see
// ../../kernels-inl.h.
#pragma once

#include "../pooling_kernels.h"

namespace fastquant {
namespace {

constexpr PoolingKernels pooling_table() { return {}; }

}  // namespace
}  // namespace fastquant
