// The interface of vector types, which arithmetic and kernels are written in. There is one for each
// instruction set and type of arithmetic (float, double): cpu/vec_*.h, and cuda/vec_cuda.cuh for one element
// on a GPU. Kernel tables check that a type has all of it.
//
// Types and constants
//   N              elements of a vector
//   Element        their type, float or double
//   Reg, Mask      a vector, and a truth value for each element
//   Words          (CPU, float, N > 1) vectors of 16-bit integers, see below
//   kStoresOthers  (CPU) whether there are eq and store_others
//   kAlternates    (CPU, float) the order of load_pair for BFloat16
//
// Arithmetic, for math/: every operation rounds once
//   set1(x)                  x in every element
//   add, sub, mul, div(a, b)
//   min, max(a, b)           b where either is NaN: min(x, acc) leaves a NaN x out, min(bound, x) keeps it
//   nmadd(a, b, c)           (float) c - a * b; for one element only where a * b fits twice the precision
//   third(x)                 (float) x / 3
//   round, floor(x)          to whole numbers; round to nearest, ties to even
//   madd(a, b, c)            (float, and types of one element) a * b + c, rounded once
//   lt, le(a, b)             a < b, a <= b; false where either is NaN
//   not_lt(a, b)             true where either is NaN
//   not_le(a, b)             (CPU) true where either is NaN
//   both(m, n)               m and n
//   select(m, yes, no)
//
// Memory and masks, for CPU kernels
//   load(p)                  from Element*; float also from Half* and BFloat16*, double from float*
//   store(p, x)              to the same types as load, but double to double* only
//   load_pair(p, &a, &b)     2 N elements, in whatever order is cheapest for their type: as they lie in memory,
//                            or, for BFloat16 where kAlternates is set, every second element
//   store_pair_normal(p, a, b)   stores in that order; of NaN, only those that load_pair loaded
//   pair_bits(p, m, n)       the bits of the masks of such a pair, in the order of memory
//   rounded_to(p, x)         rounded as store(p, x) would; *p is not read
//   store_index(p, x)        N int32, truncated towards zero
//   store_others(p, m, x)    stores the elements for which m is false side by side, and returns how many. It
//                            may write a whole vector to p
//   even, odd(a, b)          (float) every second element of a, then of b
//   zip_low, zip_high(a, b)  (float) first elements of a and b, second ones, …: the lower and upper half of
//   these lowest, highest(x)       of all elements eq, unordered(a, b)      unordered: where either is NaN
//   either(m, n), none(), any(m)
//   bits(m), from_bits(b)    a bit for each element
//
// Words: N, Reg; set1, load, store; min, max (signed), max_unsigned; where_negative(sign, yes, no);
//   lowest, highest (signed), highest_unsigned, of all elements, as int.
#pragma once

#include "numbers.h"

namespace fastquant {
namespace {

// Each check assigns functions to pointers of the types that they must have: it compiles, or it does not.

template <class V>
constexpr bool has_arithmetic() {
  using T = typename V::Element;
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  static_assert(V::N >= 1, "N");
  [[maybe_unused]] constexpr Reg (*kOfOne)(T) = V::set1;
  [[maybe_unused]] constexpr Reg (*kUnary)(Reg) = V::round;
  [[maybe_unused]] constexpr Reg (*kBinary[])(Reg, Reg) = {V::add, V::sub, V::mul, V::div, V::min, V::max};
  [[maybe_unused]] constexpr Mask (*kComparisons[])(Reg, Reg) = {V::lt, V::le, V::not_lt};
  [[maybe_unused]] constexpr Mask (*kBoth)(Mask, Mask) = V::both;
  [[maybe_unused]] constexpr Reg (*kSelect)(Mask, Reg, Reg) = V::select;
  if constexpr (sizeof(T) == sizeof(float)) {
    [[maybe_unused]] constexpr Reg (*kMore[])(Reg) = {V::floor, V::third};
    [[maybe_unused]] constexpr Reg (*kFused[])(Reg, Reg, Reg) = {V::madd, V::nmadd};
  }
  if constexpr (V::N == 1) {
    [[maybe_unused]] constexpr T (*kMadd)(T, T, T) = V::madd;
  }
  return true;
}

template <class V, class Stored>
constexpr bool loads_and_stores() {
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  [[maybe_unused]] constexpr Reg (*kLoad)(const Stored*) = V::load;
  [[maybe_unused]] constexpr void (*kLoadPair)(const Stored*, Reg*, Reg*) = V::load_pair;
  [[maybe_unused]] constexpr void (*kStore)(Stored*, Reg) = V::store;
  [[maybe_unused]] constexpr void (*kStorePair)(Stored*, Reg, Reg) = V::store_pair_normal;
  [[maybe_unused]] constexpr uint32_t (*kPairBits)(const Stored*, Mask, Mask) = V::pair_bits;
  [[maybe_unused]] constexpr Reg (*kRoundedTo)(const Stored*, Reg) = V::rounded_to;
  return true;
}

template <class W>
constexpr bool has_words() {
  using Reg = typename W::Reg;
  [[maybe_unused]] constexpr Reg (*kSet1)(int) = W::set1;
  [[maybe_unused]] constexpr Reg (*kLoad)(const void*) = W::load;
  [[maybe_unused]] constexpr void (*kStore)(void*, Reg) = W::store;
  [[maybe_unused]] constexpr Reg (*kBinary[])(Reg, Reg) = {W::min, W::max, W::max_unsigned};
  [[maybe_unused]] constexpr Reg (*kSelect)(Reg, Reg, Reg) = W::where_negative;
  [[maybe_unused]] constexpr int (*kOfAll[])(Reg) = {W::lowest, W::highest, W::highest_unsigned};
  return W::N > 1;
}

template <class V>
constexpr bool has_vector_interface() {
  using T = typename V::Element;
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  [[maybe_unused]] constexpr void (*kStoreIndex)(int32_t*, Reg) = V::store_index;
  [[maybe_unused]] constexpr T (*kOfAll[])(Reg) = {V::lowest, V::highest};
  [[maybe_unused]] constexpr Mask (*kComparisons[])(Reg, Reg) = {V::unordered, V::not_le};
  [[maybe_unused]] constexpr Mask (*kEither)(Mask, Mask) = V::either;
  [[maybe_unused]] constexpr Mask (*kNone)() = V::none;
  [[maybe_unused]] constexpr bool (*kAny)(Mask) = V::any;
  [[maybe_unused]] constexpr uint32_t (*kBits)(Mask) = V::bits;
  [[maybe_unused]] constexpr Mask (*kFromBits)(uint32_t) = V::from_bits;
  bool all = has_arithmetic<V>() && loads_and_stores<V, T>();
  if constexpr (sizeof(T) == sizeof(float)) {
    [[maybe_unused]] constexpr bool kOrder = V::kAlternates;
    [[maybe_unused]] constexpr Reg (*kOfPairs[])(Reg, Reg) = {V::even, V::odd, V::zip_low, V::zip_high};
    all = all && loads_and_stores<V, Half>() && loads_and_stores<V, BFloat16>();
    if constexpr (V::N > 1) all = all && has_words<typename V::Words>();
  } else {
    [[maybe_unused]] constexpr Reg (*kLoadFloat)(const float*) = V::load;
  }
  if constexpr (V::kStoresOthers) {
    [[maybe_unused]] constexpr Mask (*kEq)(Reg, Reg) = V::eq;
    [[maybe_unused]] constexpr int (*kStoreOthers)(T*, Mask, Reg) = V::store_others;
  }
  return all;
}

}  // namespace
}  // namespace fastquant
