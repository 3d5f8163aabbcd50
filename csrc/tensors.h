// Views of tensors' memory, and new tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "memory.h"

namespace fastquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Int:
      return Element::i32;
    case ScalarType::Long:
      return Element::i64;
    default:
      return Element::other;
  }
}

inline View view(const Tensor& t) {
  return {t.const_data_ptr(), element(t.scalar_type()), static_cast<int>(t.dim()),
          t.sizes().data(),   t.strides().data(),       t.numel()};
}

// x itself where its memory has neither gaps nor overlaps, else a copy laid out as torch.empty_like(x) is.
inline Tensor densified(const Tensor& x) { return is_dense(view(x)) ? x : torch::stable::clone(x); }

// Whether two tensors of the same shape and dtype lie in memory in the same order.
inline bool has_layout_of(const Tensor& x, const Tensor& y) {
  const auto a = x.sizes(), b = y.sizes(), s = x.strides(), t = y.strides();
  if (x.scalar_type() != y.scalar_type() || !std::equal(a.begin(), a.end(), b.begin(), b.end())) return false;
  for (size_t d = 0; d < a.size(); ++d) {
    if (a[d] != 1 && s[d] != t[d]) return false;
  }
  return true;
}

// A mask that can be read as aligned 64-bit words: the mask itself, or a copy where it is a view that is not
// aligned.
inline Tensor mask_words_of(const Tensor& mask) {
  const auto address = reinterpret_cast<uintptr_t>(mask.const_data_ptr());
  return mask.is_contiguous() && address % sizeof(uint64_t) == 0 ? mask : torch::stable::clone(mask);
}

// A new uninitialized tensor on the device of another tensor.
inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType type,
                            const Tensor& like) {
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& like, ScalarType type) {
  const auto sizes = like.sizes(), strides = like.strides();
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, like);
}

inline Tensor empty_as(const Tensor& like) { return empty_as(like, like.scalar_type()); }

inline Tensor empty_1d(int64_t count, ScalarType type, const Tensor& like) {
  const int64_t stride = 1;
  return empty_strided(1, &count, &stride, type, like);
}

}  // namespace fastquant
