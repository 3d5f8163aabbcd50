// Descriptions of tensors' memory for code that includes neither torch nor Python: pointers, element types,
// layouts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "math/elements.h"

namespace fastquant {

// Throws unless an invariant holds. Python code checks users' arguments, and its messages explain their
// mistakes.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "fastquant: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Thrown where an observer refuses NaN and infinite elements. It carries their number, which the error that
// Python raises reports.
struct NonfiniteElements : std::runtime_error {
  explicit NonfiniteElements(int64_t n)
      : std::runtime_error("fastquant: x has " + std::to_string(n) + " non-finite elements"), count(n) {}

  int64_t count;
};

// The memory of a tensor, with any strides.
struct View {
  const void* data;
  Element type;
  int dims;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t numel;
};

// A small contiguous buffer.
struct Array {
  void* data;
  Element type;
  int64_t numel;
  const char* name;
};

inline void check_count(const Array& a, int64_t count) {
  check(a.numel == count, a.name, " has ", a.numel, " elements, needs ", count);
}

// Memory without gaps or overlaps, viewed as [outer, channels, inner]. Per-tensor quantization has one channel.
struct Dense {
  const void* data;
  Element type;
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
};

// Two tensors of one type and layout. Their sum is clamped to [low, high]; an infinite bound clamps nothing.
struct SumOfTensors {
  Dense a;
  const void* b;
  double low, high;
};

inline void check_int8_range(int64_t quant_min, int64_t quant_max) {
  check(-128 <= quant_min && quant_min < quant_max && quant_max <= 127, "quant_min ", quant_min,
        " and quant_max ", quant_max, " must be ascending int8 values");
}

constexpr int kMaxDims = 64;

inline bool is_dense(const View& x) {
  check(x.dims <= kMaxDims, "x has too many dimensions");
  if (x.numel == 0) return true;
  int order[kMaxDims];
  int count = 0;
  int64_t expected = 1;
  bool contiguous = true;
  for (int d = x.dims - 1; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    contiguous = contiguous && x.strides[d] == expected;
    expected *= x.sizes[d];
    order[count++] = d;
  }
  if (contiguous) return true;
  std::sort(order, order + count, [&](int a, int b) { return x.strides[a] < x.strides[b]; });
  expected = 1;
  for (int k = 0; k < count; ++k) {
    if (x.strides[order[k]] != expected) return false;
    expected *= x.sizes[order[k]];
  }
  return true;
}

// The layout of a view that is_dense.
inline Dense dense(const View& x, std::optional<int64_t> ch_axis) {
  Dense d = {x.data, x.type, 1, 1, x.numel};
  if (!ch_axis.has_value()) return d;
  const int64_t axis = *ch_axis < 0 ? *ch_axis + x.dims : *ch_axis;
  check(axis >= 0 && axis < x.dims, "ch_axis ", *ch_axis, " is out of range for ", x.dims, " dimensions");
  d.channels = x.sizes[axis];
  if (x.numel == 0) {
    d.inner = 0;
  } else if (d.channels > 1) {
    d.inner = x.strides[axis];
    d.outer = x.numel / (d.channels * d.inner);
  }
  return d;
}

// Calls f with a value of the floating type that elements are stored in.
template <class F>
auto with_stored_type(Element type, const F& f) {
  switch (type) {
    case Element::f32:
      return f(float{});
    case Element::f64:
      return f(double{});
    case Element::f16:
      return f(Half{});
    case Element::bf16:
      return f(BFloat16{});
    default:
      check(false, "x must be a floating tensor");
      return f(float{});
  }
}

}  // namespace fastquant
