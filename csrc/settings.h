// What the ops that observe and choose quantization parameters take besides x: one struct for the CPU, for
// CUDA and for the fast calls. Free of torch.
#pragma once

#include <optional>

#include "math/qparams.h"
#include "memory.h"

namespace fastquant {

struct ObserveSettings {
  std::optional<int64_t> ch_axis;
  std::optional<double> averaging_constant;
  QParamsConfig qparams;
  NonFinite nonfinite;
};

// The buffers that these ops update, and eps.
struct FusedBuffers {
  Array min_val, max_val, scale, zero_point, nonfinite_count, eps;
};

}  // namespace fastquant
