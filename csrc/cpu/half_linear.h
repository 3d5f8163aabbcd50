// Linear layers with fp16 weights on plain memory, in parallel.
#pragma once

#include "kernels.h"

namespace fastquant {

void half_linear(const HalfLinear& layer);

}  // namespace fastquant
