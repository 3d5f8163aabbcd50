// Reads and writes elements of small buffers, whose element type is known only at run time.
#pragma once

#include <type_traits>

#include "numbers.h"

// Functions that CPU code and GPU kernels call, but not the host code of .cu files.
#ifdef __CUDACC__
#define FASTQUANT_DEVICE __device__
#else
#define FASTQUANT_DEVICE
#endif

namespace fastquant {

enum class Element : uint8_t { f32, f64, f16, bf16, i32, i64, other };

namespace {

template <class S>
FASTQUANT_DEVICE auto number(S element) {
  if constexpr (std::is_integral_v<S>) {
    return element;
  } else {
    return to_compute(element);
  }
}

// Floating types round the value to nearest; integer types truncate it.
template <class S, class T>
FASTQUANT_DEVICE void assign(S* to, T value) {
  if constexpr (!std::is_integral_v<S>) {
    from_compute(to, static_cast<Compute<S>>(value));
  } else if constexpr (std::is_integral_v<T>) {
    *to = static_cast<S>(value);
  } else {
    *to = saturated<S>(value);
  }
}

// Calls f with a value of the type of a buffer's elements.
template <class F>
FASTQUANT_DEVICE auto with_element(Element type, const F& f) {
  switch (type) {
    case Element::f64:
      return f(double{});
    case Element::f16:
      return f(Half{});
    case Element::bf16:
      return f(BFloat16{});
    case Element::i32:
      return f(int32_t{});
    case Element::i64:
      return f(int64_t{});
    default:
      return f(float{});
  }
}

// The value rounded to this element type. A finite value that is too large becomes the largest finite one.
template <class T>
FASTQUANT_DEVICE T rounded_to(Element type, T value) {
  return with_element(type, [&](auto element) {
    if constexpr (!std::is_integral_v<decltype(element)>) value = kept_finite(value, largest_of(element));
    assign(&element, value);
    return static_cast<T>(number(element));
  });
}

}  // namespace
}  // namespace fastquant
