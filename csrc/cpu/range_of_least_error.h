// The search for the scale and zero point of least squared error, of all on a grid, for any distribution of
// which the tails are known (math/tails.h).
#pragma once

#include <algorithm>

#include "../math/qparams.h"
#include "../math/tails.h"

namespace fastquant {

// The widths that are tried, as shares of the whole range: k / kWidest, of which neighbours differ by 1 in k or
// by 1/128, whichever is more.
constexpr int64_t kWidest = 2048;

inline int64_t next_narrower(int64_t k) { return k - std::max<int64_t>(1, k / 128); }

// left, right: the two sides of 0, in some unit. whole: all values, and 0, in their own unit. Of equal errors,
// the widest range is chosen.
template <class OneSide>
Range<double> range_of_least_error(const OneSide& left, const OneSide& right, const Range<double>& whole,
                                   double unit, const QParamsConfig& grid) {
  const int64_t steps = grid.quant_max - grid.quant_min;
  const bool symmetric = grid.scheme == Scheme::symmetric;
  const double of_steps = static_cast<double>(steps);
  const double largest_scale = symmetric ? std::max(-whole.low, whole.high) / (of_steps / 2)
                                         : whole.high / of_steps - whole.low / of_steps;
  const double squares = left.beyond(0).second + right.beyond(0).second;
  double best = infinity<double>();
  Range<double> found = whole;
  for (int64_t k = kWidest; k > 0; k = next_narrower(k)) {
    const double scale = static_cast<double>(k) / static_cast<double>(kWidest) * largest_scale;
    const double step = scale / unit;
    int64_t below = symmetric ? grid.symmetric_zero_point - grid.quant_min : 0;
    // No narrower range can do better once clipping alone costs more than the best error.
    const double clipping = symmetric ? left.beyond(static_cast<double>(below) * step).second +
                                            right.beyond(static_cast<double>(steps - below) * step).second
                                      : least_clipping_error(left, right, step, steps);
    if (clipping >= best) break;
    if (!symmetric) {
      // Of values on one side of 0, no levels are needed on the other.
      below = whole.low == 0 ? 0 : whole.high == 0 ? steps : best_levels_below(left, right, step, steps);
    }
    const double gain = gain_of_levels(left, step, below) + gain_of_levels(right, step, steps - below);
    const double error = squares - 2 * step * gain;
    if (error < best) {
      best = error;
      const double half = scale * (of_steps / 2);
      found = symmetric ? Range<double>{-half, half}
                        : Range<double>{-static_cast<double>(below) * scale,
                                        static_cast<double>(steps - below) * scale};
    }
  }
  return found;
}

}  // namespace fastquant
