// What the kernels for batch norm with an activation and fake-quantize have in common: what is done to one
// vector of elements, and moments where vectors do not do. Elements of one channel come in rows
// (batch_norm_rows-inl.h: other dimensions follow the channels in memory), or as the column of a matrix
// (batch_norm_columns-inl.h: channels come last).
//
// Sums are taken in a fixed order: the same bits on every instruction set.
#pragma once

#include <type_traits>

#include "../../math/batch_norm.h"
#include "../kernels.h"
#include "../vec_scalar.h"

namespace fastquant {
namespace {

template <int N, class S>
void copy_elements(const S* from, S* to) {
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// Puts the elements of a pair of vectors, as load_pair returns them, in the order in which they lie in memory
// as elements of S.
template <class V, class S>
void in_order([[maybe_unused]] typename V::Reg* a, [[maybe_unused]] typename V::Reg* b) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    if constexpr (V::kAlternates) {
      const auto even = *a, odd = *b;
      *a = V::zip_low(even, odd);
      *b = V::zip_high(even, odd);
    }
  }
}

// The moments of n elements by plain loops, where squares overflow or something is not finite.
template <class S, class T>
ChunkMoments moments_one_by_one(const S* x, int64_t n, int64_t stride) {
  using One = Scalar<T>;
  T low = infinity<T>(), high = -infinity<T>();
  double sum = 0, squares = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const T e = One::load(x + i * stride);
    finite &= e - e == 0;
    low = One::min(e, low);
    high = One::max(e, high);
    sum += static_cast<double>(e);
  }
  const double mean = sum / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(One::load(x + i * stride)) - mean;
    squares += d * d;
  }
  return {mean, squares, static_cast<double>(low), static_cast<double>(high), finite};
}

// What was summed about a centre.
template <class T>
struct MomentsAbout {
  T centre;
  double distances, squares;
  T low, high;

  ChunkMoments moments(int64_t n) const {
    const double distance = distances / static_cast<double>(n), rest = squares - distances * distance;
    return {static_cast<double>(centre) + distance, rest < 0 ? 0 : rest, static_cast<double>(low),
            static_cast<double>(high), rest - rest == 0};
  }
};

// Every NaN as the same NaN. Where an operation has two NaN, processors and compilers differ in which of them
// it returns, and in the sign of a new one.
template <class V, bool kNeeded>
typename V::Reg same_nan(typename V::Reg x) {
  if constexpr (!kNeeded) return x;
  return V::select(V::unordered(x, x), V::set1(static_cast<typename V::Element>(__builtin_nan(""))), x);
}

// The ways from a normalized value to the result.
template <class V>
struct Quantized {
  using Vector = V;
  NormalizedQuantizer<V> quantizer;
  explicit Quantized(const Activation<typename V::Element>& a)
      : quantizer{V::set1(a.quantizer.inverse_scale), V::set1(a.step_low), V::set1(a.step_high),
                  V::set1(a.quantizer.scale)} {}
  typename V::Reg operator()(typename V::Reg x) const { return quantizer.value(x); }
};

template <class V>
struct Clamped {
  using Vector = V;
  typename V::Reg low, high;
  explicit Clamped(const Activation<typename V::Element>& a) : low(V::set1(a.low)), high(V::set1(a.high)) {}
  typename V::Reg operator()(typename V::Reg x) const { return clamped<V>(x, low, high); }
};

template <class One>
struct Exactly {
  using Vector = One;
  const Activation<typename One::Element>& activation;
  explicit Exactly(const Activation<typename One::Element>& a) : activation(a) {}
  typename One::Reg operator()(typename One::Reg x) const { return activated<One>(activation, x); }
};

template <class V, class T, class F>
void with_way(const Activation<T>& a, const F& f) {
  if (!a.quantizes) {
    f(Clamped<V>(a));
  } else if (!a.quantizer.exact) {
    f(Quantized<V>(a));
  } else {
    f(Exactly<Scalar<T>>(a));
  }
}

template <class V, class T>
NormGradients<V> gradients_of(const Range<T>& range) {
  return {V::set1(range.low), V::set1(range.high), V::set1(T{0})};
}

}  // namespace
}  // namespace fastquant
