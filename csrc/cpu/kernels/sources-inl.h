// What kernels read: the elements of a tensor, or those of the sum of two tensors. A kernel that is templated
// over its source has one body for both. V is the vector type that it reads with; T that of the arithmetic.
#pragma once

#include "../../math/clamped_sum.h"
#include "../kernels.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// The elements of a tensor.
template <class S>
struct Elements {
  using Stored = S;
  static constexpr bool kClamps = false;
  const S* x;

  template <class V>
  typename V::Reg load(int64_t i) const {
    return V::load(x + i);
  }
  template <class V>
  void load_pair(int64_t i, typename V::Reg* first, typename V::Reg* second) const {
    V::load_pair(x + i, first, second);
  }
  template <int kElements>
  void fetch(int64_t i) const {
    fetch_ahead<kElements>(x + i);
  }
};

// The elements of a + b, in the precision of the arithmetic.
template <class S>
struct Sums {
  using Stored = S;
  static constexpr bool kClamps = false;
  const S *a, *b;

  template <class V>
  typename V::Reg load(int64_t i) const {
    return V::add(V::load(a + i), V::load(b + i));
  }
  template <class V>
  void load_pair(int64_t i, typename V::Reg* first, typename V::Reg* second) const {
    typename V::Reg other_first, other_second;
    V::load_pair(a + i, first, second);
    V::load_pair(b + i, &other_first, &other_second);
    *first = V::add(*first, other_first);
    *second = V::add(*second, other_second);
  }
  template <int kElements>
  void fetch(int64_t i) const {
    fetch_ahead<kElements>(a + i);
    fetch_ahead<kElements>(b + i);
  }
};

// The elements of a + b as a tensor of type S would hold them, clamped.
template <class S>
struct ClampedSums {
  using Stored = S;
  static constexpr bool kClamps = true;
  Summands<S, Compute<S>> of;

  template <class V>
  ClampedSum<V> sum() const {
    return {V::set1(of.low), V::set1(of.high)};
  }
  template <class V>
  typename V::Reg load(int64_t i) const {
    return sum<V>().value(of.a, V::load(of.a + i), V::load(of.b + i));
  }
  template <class V>
  void load_pair(int64_t i, typename V::Reg* first, typename V::Reg* second) const {
    typename V::Reg other_first, other_second;
    V::load_pair(of.a + i, first, second);
    V::load_pair(of.b + i, &other_first, &other_second);
    *first = sum<V>().value(of.a, *first, other_first);
    *second = sum<V>().value(of.a, *second, other_second);
  }
  template <int kElements>
  void fetch(int64_t i) const {
    fetch_ahead<kElements>(of.a + i);
    fetch_ahead<kElements>(of.b + i);
  }
};

}  // namespace
}  // namespace fastquant
