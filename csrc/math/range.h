// The range of a tensor or channel, and how an observer updates its own with it. B is the precision of the
// buffers.
#pragma once

#include "numbers.h"

namespace fastquant {
// What an observing op does with NaN and infinities.
enum class NonFinite : int64_t { ignore = 0, raise = 1, propagate = 2 };

template <class B>
struct Range {
  B low, high;
};

namespace {

// Whether anything was observed.
template <class B>
FASTQUANT_HD bool is_observed(Range<B> r) {
  return !(r.low == infinity<B>() && r.high == -infinity<B>());
}

// Unlike the min and max of vector types, least and greatest return NaN where either argument is NaN.
template <class B>
FASTQUANT_HD B least(B a, B b) {
  return a != a ? a : (b < a || b != b ? b : a);
}

template <class B>
FASTQUANT_HD B greatest(B a, B b) {
  return a != a ? a : (a < b || b != b ? b : a);
}

// A step of a moving average, correct even where the difference overflows.
template <class B>
FASTQUANT_HD B moved_average(B so_far, B now, B constant) {
  const B difference = now - so_far;
  if (difference - difference == 0 || so_far - so_far != 0 || now - now != 0)
    return so_far + constant * difference;
  return (B{1} - constant) * so_far + constant * now;
}

// Combines the observed range with that of a new tensor: by a moving average where `averages` is set, else by
// the minimum and maximum of both.
template <class B>
FASTQUANT_HD Range<B> folded(Range<B> so_far, Range<B> now, bool averages, B constant) {
  if (!averages) return {least(now.low, so_far.low), greatest(now.high, so_far.high)};
  if (!is_observed(so_far)) return now;
  return {moved_average(so_far.low, now.low, constant), moved_average(so_far.high, now.high, constant)};
}

}  // namespace
}  // namespace fastquant
