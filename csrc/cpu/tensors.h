// From tensors to what kernels take: element types, memory layout, buffers, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace fastquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxDims = 64;

// ------------------------------------------------------------------------------ types

inline const KernelsFor<float, float>& kernels_of(float) { return kernels().f32; }
inline const KernelsFor<double, double>& kernels_of(double) { return kernels().f64; }
inline const KernelsFor<Half, float>& kernels_of(Half) { return kernels().f16; }
inline const KernelsFor<BFloat16, float>& kernels_of(BFloat16) { return kernels().bf16; }

// Calls f with a value of the type that `type` is stored in.
template <class F>
auto with_stored_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "fastquant: x must be a floating tensor");
  }
}

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// ---------------------------------------------------------------------------- buffers

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(Half x) { return to_compute(x); }
inline float number(BFloat16 x) { return to_compute(x); }
template <class Integer>
Integer number(Integer x) {
  return x;
}

template <class T>
void assign(float* to, T x) {
  *to = static_cast<float>(x);
}
template <class T>
void assign(double* to, T x) {
  *to = static_cast<double>(x);
}
template <class T>
void assign(Half* to, T x) {
  from_compute(to, static_cast<float>(x));
}
template <class T>
void assign(BFloat16* to, T x) {
  from_compute(to, static_cast<float>(x));
}
template <class T>
void assign(int32_t* to, T x) {
  *to = static_cast<int32_t>(x);
}
template <class T>
void assign(int64_t* to, T x) {
  *to = static_cast<int64_t>(x);
}

// Calls f with a value of the type that a buffer's elements have.
template <class F>
auto with_buffer_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Long:
      return f(int64_t{});
    default:
      return with_stored_type(type, f);
  }
}

// The elements of a small contiguous tensor, floating or integer, as T.
template <class T>
std::vector<T> read_values(const Tensor& t) {
  const int64_t n = t.numel();
  std::vector<T> values(n);
  with_buffer_type(t.scalar_type(), [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(t.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(number(data[i]));
  });
  return values;
}

template <class T>
void write_values(Tensor& t, const std::vector<T>& values) {
  with_buffer_type(t.scalar_type(), [&](auto element) {
    auto* data = static_cast<decltype(element)*>(t.mutable_data_ptr());
    const int64_t n = static_cast<int64_t>(values.size());
    for (int64_t i = 0; i < n; ++i) assign(data + i, values[i]);
  });
}

// The only element of a tensor.
template <class T>
T read_value(const Tensor& t) {
  return with_buffer_type(t.scalar_type(), [&](auto element) {
    return static_cast<T>(number(*static_cast<const decltype(element)*>(t.const_data_ptr())));
  });
}

template <class T>
void write_value(Tensor& t, T value) {
  with_buffer_type(t.scalar_type(), [&](auto element) {
    assign(static_cast<decltype(element)*>(t.mutable_data_ptr()), value);
  });
}

// A value as a buffer of this type will hold it.
template <class T>
T rounded_to(ScalarType type, T value) {
  return with_stored_type(type, [&](auto element) {
    assign(&element, value);
    return static_cast<T>(number(element));
  });
}

// A flag of any integer type; anything but zero is on.
inline bool flag(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1 && t.is_cpu(), "fastquant: a flag must be a CPU tensor of one element");
  const auto* bytes = static_cast<const uint8_t*>(t.const_data_ptr());
  return std::any_of(bytes, bytes + t.element_size(), [](uint8_t b) { return b != 0; });
}

// An in-place buffer of `count` elements.
inline void check_buffer(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), "fastquant: ", name, " must be on the CPU as x is");
  STD_TORCH_CHECK(t.numel() == count, "fastquant: ", name, " has ", t.numel(), " elements, x needs ", count);
  STD_TORCH_CHECK(t.is_contiguous(), "fastquant: ", name, " must be contiguous");
}

// ----------------------------------------------------------------------------- layout

// Memory without gaps or overlaps, seen as [outer, channels, inner]; per tensor that is
// one channel.
struct Dense {
  Tensor tensor;
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
};

inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  STD_TORCH_CHECK(x.dim() <= kMaxDims, "fastquant: x has too many dimensions");
  int order[kMaxDims];
  int count = 0;
  for (int d = 0; d < x.dim(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) order[count++] = d;
  }
  std::sort(order, order + count, [&](int a, int b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int k = 0; k < count; ++k) {
    if (strides[order[k]] != expected) return false;
    expected *= sizes[order[k]];
  }
  return true;
}

// x itself where its memory is dense, else a copy laid out as torch.empty_like(x) is.
inline Dense dense(const Tensor& x, std::optional<int64_t> ch_axis) {
  Dense d = {is_dense(x) ? x : torch::stable::clone(x), 1, 1, x.numel()};
  if (!ch_axis.has_value()) return d;
  const int64_t dims = x.dim();
  const int64_t axis = *ch_axis < 0 ? *ch_axis + dims : *ch_axis;
  STD_TORCH_CHECK(axis >= 0 && axis < dims, "fastquant: ch_axis ", *ch_axis, " is out of range for ", dims,
                  " dimensions");
  d.channels = x.size(axis);
  if (x.numel() == 0) {
    d.inner = 0;
  } else {
    d.inner = d.channels > 1 ? d.tensor.stride(axis) : x.numel();
    d.outer = x.numel() / (d.channels * d.inner);
  }
  return d;
}

inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, const Tensor& like) {
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& like) { return empty_strided(like.sizes(), like.strides(), like); }

inline Tensor empty_1d(int64_t count, ScalarType type) {
  const int64_t sizes[1] = {count};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), type);
}

// ---------------------------------------------------------------------------- threads

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// How many pieces to cut n elements into.
inline int64_t piece_count(int64_t n) {
  if (n < 2 * kGrain) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), n / kGrain);
}

// f(piece, begin, end) for `pieces` pieces of [0, n), each but the last a multiple of unit.
template <class F>
void for_pieces(int64_t n, int64_t pieces, int64_t unit, const F& f) {
  if (pieces <= 1) {
    f(int64_t{0}, int64_t{0}, n);
    return;
  }
  const int64_t units = (n + unit - 1) / unit;
  const int64_t size = (units + pieces - 1) / pieces * unit;
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = std::min(p * size, n);
      f(p, begin, std::min(begin + size, n));
    }
  });
}

}  // namespace fastquant
