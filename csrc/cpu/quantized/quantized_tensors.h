// Quantized tensors as arguments and results of ops: their memory, sizes and strides.
#pragma once

#include <cmath>
#include <vector>

#include "../../tensors.h"
#include "../huge_pages.h"
#include "quantization.h"

namespace fastquant {

using Shape = std::vector<int64_t>;

inline bool is_int8(ScalarType type) {
  check(type == ScalarType::Byte || type == ScalarType::Char, "a quantized tensor must be uint8 or int8");
  return type == ScalarType::Char;
}

inline Quantization quantization(double scale, int64_t zero_point, ScalarType type) {
  check(scale > 0 && scale < INFINITY, "scale must be positive and finite, got ", scale);
  return {scale, zero_point, is_int8(type)};
}

inline const uint8_t* bytes(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }
inline uint8_t* bytes(Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

inline Shape sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }
inline Shape strides_of(const Tensor& x) { return {x.strides().begin(), x.strides().end()}; }

// The strides of a tensor without gaps, whose dimensions lie in memory in this order, outermost first.
inline Shape dense_strides(const Shape& sizes, const Shape& order) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = order.size(); k-- > 0;) {
    strides[order[k]] = stride;
    stride *= std::max<int64_t>(sizes[order[k]], 1);
  }
  return strides;
}

inline Shape in_order(size_t dims) {
  Shape order;
  for (size_t d = 0; d < dims; ++d) order.push_back(static_cast<int64_t>(d));
  return order;
}

inline Shape contiguous_strides(const Shape& sizes) { return dense_strides(sizes, in_order(sizes.size())); }

inline Shape channels_last_strides(const Shape& sizes) {
  Shape strides(sizes.size());
  int64_t stride = sizes[1];
  strides[1] = 1;
  for (size_t d = sizes.size(); d-- > 2; stride *= sizes[d]) strides[d] = stride;
  strides[0] = stride;
  return strides;
}

inline Tensor empty(const Shape& sizes, const Shape& strides, ScalarType type, const Tensor& like) {
  Tensor y = empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, like);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * static_cast<int64_t>(y.element_size()));
  return y;
}

inline Tensor empty_like(const Tensor& x, ScalarType type) {
  return empty(sizes_of(x), strides_of(x), type, x);
}

inline bool has_strides(const Tensor& x, const Shape& strides) {
  const auto sizes = x.sizes(), s = x.strides();
  for (size_t d = 0; d < strides.size(); ++d) {
    if (sizes[d] != 1 && s[d] != strides[d]) return false;
  }
  return true;
}

}  // namespace fastquant
