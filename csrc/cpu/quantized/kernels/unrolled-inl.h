// Loops that are unrolled when they are compiled: accumulators in arrays then stay in registers, which
// compilers do not achieve for arrays that ordinary loops index.
#pragma once

#include <cstdint>
#include <utility>

#define FASTQUANT_INLINE __attribute__((always_inline)) inline
#define FASTQUANT_INLINE_LAMBDA __attribute__((always_inline))

namespace fastquant {
namespace {

template <int kValue>
struct Index {
  FASTQUANT_INLINE constexpr operator int() const { return kValue; }
};

template <int... kIndices, class F>
FASTQUANT_INLINE void for_each_index(std::integer_sequence<int, kIndices...>, const F& f) {
  (f(Index<kIndices>()), ...);
}

// f(Index<0>()), …, f(Index<N - 1>()). A recursion would be inlined once for each of its callers, and take much
// longer to compile.
template <int N, class F>
FASTQUANT_INLINE void unrolled(const F& f) {
  for_each_index(std::make_integer_sequence<int, N>(), f);
}

}  // namespace
}  // namespace fastquant
