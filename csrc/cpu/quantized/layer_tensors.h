// Weights and settings of linear layers and convolutions, as the arguments of their ops.
#pragma once

#include <optional>
#include <vector>

#include "../../tensors.h"
#include "geometry.h"
#include "packing.h"

namespace fastquant {

inline const uint8_t* packed_data(const Tensor& packed, const PackedLayout& layout) {
  check(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed_weight must be a contiguous uint8 tensor on the CPU");
  check(packed.numel() == layout.bytes(), "packed_weight has ", packed.numel(), " bytes, needs ",
        layout.bytes());
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// bias: may be absent.
inline LayerScales scales_of(const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t channels) {
  const auto is_floats = [](const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous();
  };
  check(is_floats(weight_scale), "weight_scale must be a contiguous float32 tensor on the CPU");
  const int64_t count = weight_scale.numel();
  check(count == 1 || count == channels, "weight_scale has ", count, " elements, needs 1 or ", channels);
  const float* b = nullptr;
  if (bias.has_value()) {
    check(is_floats(*bias), "bias must be a contiguous float32 tensor on the CPU");
    check(bias->numel() == channels, "bias has ", bias->numel(), " elements, needs ", channels);
    b = static_cast<const float*>(bias->const_data_ptr());
  }
  return {static_cast<const float*>(weight_scale.const_data_ptr()), count != 1, b};
}

inline SpatialSizes spatial(const std::vector<int64_t>& values) {
  return {values.data(), static_cast<int64_t>(values.size())};
}

inline ConvArguments arguments_of(const std::vector<int64_t>& weight_shape, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  int64_t groups) {
  return {weight_shape.data(), static_cast<int64_t>(weight_shape.size()),
          spatial(stride),     spatial(padding),
          spatial(dilation),   groups};
}

}  // namespace fastquant
