// How much of a distribution lies beyond a point, and how far: what the error of quantizing it follows from.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace fastquant {
namespace {

// The values beyond some point: how many, and the sums of their distances from it and of the squares of these.
struct Tail {
  double mass, first, second;
};

// The tail at a point that lies `step` before the point of `tail`, if no values lie between them.
FASTQUANT_HD inline Tail extended(const Tail& tail, double step) {
  return {tail.mass, tail.first + step * tail.mass, tail.second + step * (2 * tail.first + step * tail.mass)};
}

// The same if `count` values lie between them, evenly spread.
FASTQUANT_HD inline Tail extended(const Tail& tail, double step, double count) {
  const Tail t = extended(tail, step);
  return {t.mass + count, t.first + count * step / 2, t.second + count * step * step / 3};
}

// One side of a histogram, seen from 0 outwards. The unit is the width of a bin. Bin i reaches from start + i
// to start + i + 1, and 0 lies in bin 0 or before it.
struct Side {
  const Tail* tails;  // tails[i] is the tail where bin i begins; one more entry, of zeros, where the last ends
  const double* counts;  // of bins
  int64_t bins;
  double start;

  // The tail at a distance from 0.
  FASTQUANT_HD Tail beyond(double distance) const {
    const double position = distance - start;
    if (position < 0) return extended(tails[0], -position);
    if (!(position < static_cast<double>(bins))) return {0, 0, 0};
    const int64_t bin = static_cast<int64_t>(position);
    const double step = static_cast<double>(bin + 1) - position;
    return extended(tails[bin + 1], step, counts[bin] * step);
  }
};

// The error of quantizing a distribution to levels of a lattice. Let H(e) be the sum of the distances by which
// the values on one side of 0 lie beyond e. A value x > 0 of which n bounds e_k = (k + 1/2) scale lie below x
// is quantized to n scale, with the error
//
//   (x - n scale)² = x² - 2 n scale x + (n scale)² = x² - 2 scale (sum of (x - e_k) over these n bounds),
//
// because n² is the sum of the first n odd numbers. Summed over all values, the squared error is
//
//   (sum of x²) - 2 scale (sum of H(e_k) over the levels),
//
// which also holds for values beyond the last level. The same holds for the other side, and the levels of both
// sides add up: the more H(e_k) a level has, the more is gained by it.
template <class OneSide>
double first_beyond(const OneSide& side, double scale, int64_t level) {
  return side.beyond((static_cast<double>(level) + 0.5) * scale).first;
}

template <class OneSide>
double gain_of_levels(const OneSide& side, double scale, int64_t levels) {
  double sum = 0;
  for (int64_t k = 0; k < levels; ++k) {
    const double more = first_beyond(side, scale, k);
    if (more == 0) break;
    sum += more;
  }
  return sum;
}

// The smallest n of [0, most] for which `rises(n)` is true, if it is false up to some n and true from there on;
// `most` if it is never true.
template <class Rises>
int64_t first_rise(int64_t most, const Rises& rises) {
  int64_t low = 0, high = most;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (rises(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// How many of `steps` levels besides 0 to give to the left side, for the least squared error. The first levels
// of a side gain most, so the best choice gives each level to the side where it gains more.
template <class OneSide>
int64_t best_levels_below(const OneSide& left, const OneSide& right, double scale, int64_t steps) {
  return first_rise(steps, [&](int64_t n) {
    return first_beyond(left, scale, n) <= first_beyond(right, scale, steps - n - 1);
  });
}

// A lower bound of the error of clipping to any range of width steps * scale, and hence of that of quantizing
// to such a range or a narrower one.
template <class OneSide>
double least_clipping_error(const OneSide& left, const OneSide& right, double scale, int64_t steps) {
  const auto at = [&](const OneSide& side, int64_t n) { return side.beyond(static_cast<double>(n) * scale); };
  // The derivative of the error in the end of the range is -2 H there. The best range ends between the last n
  // for which its left end should move out and the first for which it should not.
  const int64_t n =
      first_rise(steps, [&](int64_t k) { return at(left, k).first <= at(right, steps - k).first; });
  return at(left, n).second + at(right, steps - n + 1).second;
}

}  // namespace
}  // namespace fastquant
