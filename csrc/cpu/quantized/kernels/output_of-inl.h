// From bytes to steps of an output, and back, for vectors of bytes.
#pragma once

#include "../bytes.h"
#include "../elementwise_kernels.h"

namespace fastquant {
namespace {

// Plain: nothing is int8, and no element counts more than 2^20 steps.
template <class B, bool kPlain = false>
struct OutputOf {
  explicit OutputOf(const Output& o)
      : zero_point(B::words1(o.zero_point)),
        low(B::set1(o.low)),
        high(B::set1(o.high)),
        flip(B::set1(o.flip)) {}

  typename B::Reg limited(typename B::Reg q) const {
    const auto within = B::min(B::max(q, low), high);
    return kPlain ? within : B::flip(within, flip);
  }
  typename B::Reg value(const typename B::Floats::Reg* steps) const {
    return limited(kPlain ? B::narrow_few(steps, zero_point) : B::narrow(steps, zero_point));
  }
  typename B::Reg value_in_order(const typename B::Floats::Reg* steps) const {
    return limited(B::narrow_in_order(steps, zero_point));
  }

  typename B::Words zero_point;
  typename B::Reg low, high, flip;
};

template <class B, bool kPlain = false>
struct OperandOf {
  using F = typename B::Floats;

  explicit OperandOf(const Operand& o)
      : ratio(F::set1(o.ratio)), center(B::center_of(o.zero_point)), flip(B::set1(o.flip)) {}

  void centered(typename B::Reg x, typename F::Reg* y) const {
    B::widen(kPlain ? x : B::flip(x, flip), center, y);
  }
  void steps(typename B::Reg x, typename F::Reg* y) const {
    centered(x, y);
    for (int k = 0; k < B::kParts; ++k) y[k] = F::mul(y[k], ratio);
  }

  typename F::Reg ratio, center;
  typename B::Reg flip;
};

}  // namespace
}  // namespace fastquant
