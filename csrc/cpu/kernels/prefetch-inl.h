// Software prefetching.
#pragma once

#include "../../math/numbers.h"

namespace fastquant {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Prefetches the memory `distance` bytes after the kElements elements from p on, by default into the L1 cache.
// It helps both loads and stores: hardware prefetchers stop at the end of a page, and a store has to wait for
// its cache line.
constexpr int kAhead = 4096;

template <int kElements, int kLocality = 3, class S>
void fetch_ahead(const S* p, int64_t distance = kAhead) {
  constexpr int kBytes = kElements * sizeof(S), kLine = 64;
  const char* const next = reinterpret_cast<const char*>(p) + distance;
  for (int k = 0; k < kBytes; k += kLine) __builtin_prefetch(next + k, 0, kLocality);
}

}  // namespace
}  // namespace fastquant
