// Loops that are unrolled when they are compiled: accumulators in arrays then stay in registers, which
// compilers do not achieve for arrays that ordinary loops index.
#pragma once

#include <cstdint>

#define FASTQUANT_INLINE __attribute__((always_inline)) inline
#define FASTQUANT_INLINE_LAMBDA __attribute__((always_inline))

namespace fastquant {
namespace {

template <int kValue>
struct Index {
  FASTQUANT_INLINE constexpr operator int() const { return kValue; }
};

// f(Index<0>()), …, f(Index<N - 1>())
template <int N, int kFirst = 0, class F>
FASTQUANT_INLINE void unrolled(const F& f) {
  if constexpr (kFirst < N) {
    f(Index<kFirst>());
    unrolled<N, kFirst + 1>(f);
  }
}

}  // namespace
}  // namespace fastquant
