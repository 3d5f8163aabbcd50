// Loops over vectors of bytes.
#pragma once

#include "../bytes.h"

namespace fastquant {
namespace {

// Calls step(i, load, store) for each vector of a row, which begins at column i. load(p) and store(p, x) take
// as many bytes as are left of the row, at most a vector.
template <class B, class Step>
void for_vectors(int64_t columns, const Step& step) {
  int64_t i = 0;
  for (; i + B::N <= columns; i += B::N) {
    step(i, [](const uint8_t* p) { return B::load(p); }, [](uint8_t* p, typename B::Reg x) { B::store(p, x); });
  }
  const int64_t left = columns - i;
  if (left > 0) {
    step(
        i, [left](const uint8_t* p) { return B::load_some(p, left); },
        [left](uint8_t* p, typename B::Reg x) { B::store_some(p, x, left); });
  }
}

}  // namespace
}  // namespace fastquant
