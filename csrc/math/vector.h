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
//
// Arithmetic, for math/: every operation rounds once
//   set1(x)                  x in every element
//   add, sub, mul, div(a, b)
//   min, max(a, b)           b where either is NaN: min(x, acc) leaves a NaN x out, min(bound, x) keeps it
//   nmadd(a, b, c)           (float) c - a * b; for one element only where a * b fits twice the precision
//   third(x)                 (float) x / 3
//   round, floor(x)          to whole numbers; round to nearest, ties to even
//   madd(a, b, c)            (types of one element) a * b + c
//   lt, le(a, b)             a < b, a <= b; false where either is NaN
//   not_lt(a, b)             true where either is NaN
//   both(m, n)               m and n
//   select(m, yes, no)
//
// Memory and masks, for CPU kernels
//   load(p)                  from Element*; float also from Half* and BFloat16*, double from float*
//   store(p, x)              likewise, but double to double* only
//   load_pair(p, &a, &b)     2 N elements, in the order that is cheapest for their type
//   store_pair_normal(p, a, b)   the reverse, of zero, normal numbers and NaN that load_pair gave
//   pair_bits(p, m, n)       the bits of the masks of such a pair, in the order of memory
//   store_index(p, x)        N int32, truncated towards zero
//   store_others(p, m, x)    the elements that m does not name, side by side; returns how many. It may
//                            overwrite a whole vector
//   lowest, highest(x)       of all elements
//   eq, unordered(a, b)      unordered: where either is NaN
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
  constexpr Reg (*kOfOne)(T) = V::set1;
  constexpr Reg (*kUnary)(Reg) = V::round;
  constexpr Reg (*kBinary[])(Reg, Reg) = {V::add, V::sub, V::mul, V::div, V::min, V::max};
  constexpr Mask (*kComparisons[])(Reg, Reg) = {V::lt, V::le, V::not_lt};
  constexpr Mask (*kBoth)(Mask, Mask) = V::both;
  constexpr Reg (*kSelect)(Mask, Reg, Reg) = V::select;
  bool all = kOfOne && kUnary && kBinary[0] && kComparisons[0] && kBoth && kSelect;
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr Reg (*kMore[])(Reg) = {V::floor, V::third};
    constexpr Reg (*kNmadd)(Reg, Reg, Reg) = V::nmadd;
    all = all && kMore[0] && kNmadd;
  }
  if constexpr (V::N == 1) {
    constexpr T (*kMadd)(T, T, T) = V::madd;
    all = all && kMadd;
  }
  return all;
}

template <class V, class Stored>
constexpr bool loads_and_stores() {
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  constexpr Reg (*kLoad)(const Stored*) = V::load;
  constexpr void (*kLoadPair)(const Stored*, Reg*, Reg*) = V::load_pair;
  constexpr void (*kStore)(Stored*, Reg) = V::store;
  constexpr void (*kStorePair)(Stored*, Reg, Reg) = V::store_pair_normal;
  constexpr uint32_t (*kPairBits)(const Stored*, Mask, Mask) = V::pair_bits;
  return kLoad && kLoadPair && kStore && kStorePair && kPairBits;
}

template <class W>
constexpr bool has_words() {
  using Reg = typename W::Reg;
  constexpr Reg (*kSet1)(int) = W::set1;
  constexpr Reg (*kLoad)(const void*) = W::load;
  constexpr void (*kStore)(void*, Reg) = W::store;
  constexpr Reg (*kBinary[])(Reg, Reg) = {W::min, W::max, W::max_unsigned};
  constexpr Reg (*kSelect)(Reg, Reg, Reg) = W::where_negative;
  constexpr int (*kOfAll[])(Reg) = {W::lowest, W::highest, W::highest_unsigned};
  return W::N > 1 && kSet1 && kLoad && kStore && kBinary[0] && kSelect && kOfAll[0];
}

template <class V>
constexpr bool has_vector_interface() {
  using T = typename V::Element;
  using Reg = typename V::Reg;
  using Mask = typename V::Mask;
  constexpr void (*kStoreIndex)(int32_t*, Reg) = V::store_index;
  constexpr T (*kOfAll[])(Reg) = {V::lowest, V::highest};
  constexpr Mask (*kUnordered)(Reg, Reg) = V::unordered;
  constexpr Mask (*kEither)(Mask, Mask) = V::either;
  constexpr Mask (*kNone)() = V::none;
  constexpr bool (*kAny)(Mask) = V::any;
  constexpr uint32_t (*kBits)(Mask) = V::bits;
  constexpr Mask (*kFromBits)(uint32_t) = V::from_bits;
  bool all = has_arithmetic<V>() && loads_and_stores<V, T>() && kStoreIndex && kOfAll[0] && kUnordered &&
             kEither && kNone && kAny && kBits && kFromBits;
  if constexpr (sizeof(T) == sizeof(float)) {
    all = all && loads_and_stores<V, Half>() && loads_and_stores<V, BFloat16>();
    if constexpr (V::N > 1) all = all && has_words<typename V::Words>();
  } else {
    constexpr Reg (*kLoadFloat)(const float*) = V::load;
    all = all && kLoadFloat;
  }
  if constexpr (V::kStoresOthers) {
    constexpr Mask (*kEq)(Reg, Reg) = V::eq;
    constexpr int (*kStoreOthers)(T*, Mask, Reg) = V::store_others;
    all = all && kEq && kStoreOthers;
  }
  return all;
}

}  // namespace
}  // namespace fastquant
