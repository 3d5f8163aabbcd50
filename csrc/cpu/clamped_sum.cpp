// The clamped sum of two tensors on plain memory, in parallel.
#include "clamped_sum.h"

#include "../math/clamped_sum.h"
#include "extremes.h"
#include "fake_quantize.h"
#include "locks.h"
#include "quant_params.h"
#include "statistics.h"
#include "vec_scalar.h"

namespace fastquant {
namespace {

template <class S>
Summands<S, Compute<S>> summands(const SumOfTensors& x) {
  return {static_cast<const S*>(x.a.data), static_cast<const S*>(x.b), bound_of_sum<S>(x.low),
          bound_of_sum<S>(x.high)};
}

// Both passes over the sum cut it into the same pieces, so that a thread finds in its cache what it has read.
template <class F>
void for_pieces_of_sum(const SumOfTensors& x, const F& f) {
  const int64_t n = x.a.numel();
  for_pieces(n, piece_count(n), kMaskWord, f);
}

template <class T>
struct Found {
  T low = infinity<T>(), high = -infinity<T>();
  int64_t nonfinite = 0;
};

// What `find` finds in each piece of the sum, put together.
template <class T, class F>
Found<T> found_in_pieces(const SumOfTensors& x, const F& find) {
  std::vector<Found<T>> parts(piece_count(x.a.numel()));
  for_pieces_of_sum(x, [&](int64_t piece, int64_t begin, int64_t end) {
    if (begin < end) find(begin, end, &parts[piece]);
  });
  Found<T> all;
  for (const Found<T>& part : parts) {
    all.low = std::min(all.low, part.low);
    all.high = std::max(all.high, part.high);
    all.nonfinite += part.nonfinite;
  }
  return all;
}

// The extremes of the clamped sum, and how many elements are left out of them because they are not finite.
template <class S>
Found<Compute<S>> observed(const SumOfTensors& x, NonFinite policy) {
  using T = Compute<S>;
  const auto& kernels = kernels_of(S{});
  const Summands<S, T> sum = summands<S>(x);
  Found<T> found = found_in_pieces<T>(x, [&](int64_t begin, int64_t end, Found<T>* part) {
    bool nonfinite;
    kernels.minmax_of_sum(sum, begin, end, &part->low, &part->high, &nonfinite);
    part->nonfinite = nonfinite;
  });
  // Rounding and clamping are monotone: those of the extremes are the extremes of the rounded and clamped sum.
  // -0.0 is the one number that adding leaves as it is.
  const ClampedSum<Scalar<T>> clamp = {sum.low, sum.high};
  found.low = clamp.value(sum.a, found.low, T{-0.0});
  found.high = clamp.value(sum.a, found.high, T{-0.0});
  if (found.nonfinite == 0 && found.low - found.low == 0 && found.high - found.high == 0) return found;
  if (policy == NonFinite::propagate) {
    found.nonfinite = 0;
    for (int64_t i = 0; i < x.a.numel(); ++i) {
      const T element = to_compute(sum.a[i]) + to_compute(sum.b[i]);
      if (std::isnan(element)) found.low = found.high = element;
    }
    return found;
  }
  found = found_in_pieces<T>(x, [&](int64_t begin, int64_t end, Found<T>* part) {
    kernels.minmax_finite_of_clamped_sum(sum, begin, end, &part->low, &part->high, &part->nonfinite);
  });
  if (policy == NonFinite::raise && found.nonfinite > 0) throw NonfiniteElements(found.nonfinite);
  return found;
}

}  // namespace

void observe_clamped_sum(const SumOfTensors& x, const FusedBuffers& buffers, const ObserveSettings& settings) {
  for (const Array* a : {&buffers.min_val, &buffers.max_val, &buffers.scale, &buffers.zero_point})
    check_count(*a, 1);
  if (x.a.numel() > 0) {
    with_stored_type(x.a.type, [&](auto stored) {
      const auto found = observed<decltype(stored)>(x, settings.nonfinite);
      Extremes<Compute<decltype(stored)>> extremes(1);
      extremes.low[0] = found.low;
      extremes.high[0] = found.high;
      const auto lock = locked(buffers.min_val);
      update_range(extremes, settings.averaging_constant, buffers.min_val, buffers.max_val);
      add_nonfinite(buffers.nonfinite_count, found.nonfinite);
    });
  }
  choose_qparams(buffers.min_val, buffers.max_val, buffers.eps, settings.qparams, buffers.scale,
                 buffers.zero_point);
}

void fake_quantize_clamped_sum(const SumOfTensors& x, const Array& scale, const Array& zero_point,
                               int64_t quant_min, int64_t quant_max, void* y, uint64_t* mask) {
  check_count(scale, 1);
  check_count(zero_point, 1);
  with_stored_type(x.a.type, [&](auto stored) {
    using S = decltype(stored);
    const TensorParams<Compute<S>> params(x.a.numel(), scale, zero_point, quant_min, quant_max);
    const auto sum = summands<S>(x);
    for_pieces_of_sum(x, [&](int64_t, int64_t first, int64_t last) {
      for_blocks_backwards(first, last, [&](int64_t begin, int64_t end) {
        kernels_of(S{}).fake_quantize_clamped_sum(sum, static_cast<S*>(y), mask, begin, end, params.get());
      });
    });
  });
}

void clamped_sum(const SumOfTensors& x, void* y, uint64_t* mask) {
  with_stored_type(x.a.type, [&](auto stored) {
    using S = decltype(stored);
    const auto sum = summands<S>(x);
    for_pieces_of_sum(x, [&](int64_t, int64_t begin, int64_t end) {
      if (begin < end) kernels_of(S{}).clamped_sum(sum, static_cast<S*>(y), mask, begin, end);
    });
  });
}

}  // namespace fastquant
