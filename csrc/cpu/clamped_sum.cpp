// The clamped sum of two tensors on plain memory, in parallel.
#include "clamped_sum.h"

#include "../math/clamped_sum.h"
#include "extremes.h"
#include "fake_quantize.h"
#include "locks.h"
#include "quant_params.h"
#include "statistics.h"
#include "two_passes.h"
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

template <class T>
Found<T> put_together(const std::vector<Found<T>>& parts) {
  Found<T> all;
  for (const Found<T>& part : parts) {
    all.low = std::min(all.low, part.low);
    all.high = std::max(all.high, part.high);
    all.nonfinite += part.nonfinite;
  }
  return all;
}

// What `find` finds in each piece of the sum, put together.
template <class T, class F>
Found<T> found_in_pieces(const SumOfTensors& x, const F& find) {
  std::vector<Found<T>> parts(piece_count(x.a.numel()));
  for_pieces_of_sum(x, [&](int64_t piece, int64_t begin, int64_t end) {
    if (begin < end) find(begin, end, &parts[piece]);
  });
  return put_together(parts);
}

// The extremes of a part of the sum, not yet clamped.
template <class S, class T>
void find_extremes(const Summands<S, T>& sum, int64_t begin, int64_t end, Found<T>* part) {
  bool nonfinite;
  kernels_of(S{}).minmax_of_sum(sum, begin, end, &part->low, &part->high, &nonfinite);
  part->nonfinite = nonfinite;
}

// Rounds and clamps the extremes of the sum: both are monotone, so they become the extremes of the rounded and
// clamped sum. Returns whether all elements are finite.
template <class S, class T>
bool clamp_extremes(const Summands<S, T>& sum, Found<T>* found) {
  // -0.0 is the one number that adding leaves as it is.
  const ClampedSum<Scalar<T>> clamp = {sum.low, sum.high};
  found->low = clamp.value(sum.a, found->low, T{-0.0});
  found->high = clamp.value(sum.a, found->high, T{-0.0});
  return found->nonfinite == 0 && found->low - found->low == 0 && found->high - found->high == 0;
}

// The extremes of the clamped sum, and how many elements are left out of them because they are not finite.
template <class S>
Found<Compute<S>> observed(const SumOfTensors& x, NonFinite policy) {
  using T = Compute<S>;
  const Summands<S, T> sum = summands<S>(x);
  Found<T> found = found_in_pieces<T>(
      x, [&](int64_t begin, int64_t end, Found<T>* part) { find_extremes(sum, begin, end, part); });
  if (clamp_extremes(sum, &found)) return found;
  if (policy == NonFinite::propagate) {
    found.nonfinite = 0;
    for (int64_t i = 0; i < x.a.numel(); ++i) {
      const T element = to_compute(sum.a[i]) + to_compute(sum.b[i]);
      if (std::isnan(element)) found.low = found.high = element;
    }
    return found;
  }
  found = found_in_pieces<T>(x, [&](int64_t begin, int64_t end, Found<T>* part) {
    kernels_of(S{}).minmax_finite_of_clamped_sum(sum, begin, end, &part->low, &part->high, &part->nonfinite);
  });
  if (policy == NonFinite::raise && found.nonfinite > 0) throw NonfiniteElements(found.nonfinite);
  return found;
}

template <class T>
void update_statistics(const Found<T>& found, const FusedBuffers& buffers, const ObserveSettings& settings) {
  Extremes<T> extremes(1);
  extremes.low[0] = found.low;
  extremes.high[0] = found.high;
  const auto lock = locked(buffers.min_val);
  update_range(extremes, settings.averaging_constant, buffers.min_val, buffers.max_val);
  add_nonfinite(buffers.nonfinite_count, found.nonfinite);
}

void choose_qparams(const FusedBuffers& b, const ObserveSettings& settings) {
  choose_qparams(b.min_val, b.max_val, b.eps, settings.qparams, b.scale, b.zero_point);
}

void check_counts(const FusedBuffers& b) {
  for (const Array* a : {&b.min_val, &b.max_val, &b.scale, &b.zero_point}) check_count(*a, 1);
}

// observe_fake_quantize_clamped_sum in one parallel region. Returns false, and has changed nothing, if the sum
// has elements that are not finite.
template <class S>
bool observed_and_quantized(const SumOfTensors& x, const FusedBuffers& buffers, const ObserveSettings& settings,
                            void* y, uint64_t* mask) {
  using T = Compute<S>;
  const Summands<S, T> sum = summands<S>(x);
  const int64_t n = x.a.numel();
  std::vector<Found<T>> parts(pass_pieces(n));
  std::optional<TensorParams<T>> params;
  const auto read = [&](int64_t piece, int64_t begin, int64_t end) {
    find_extremes(sum, begin, end, &parts[piece]);
  };
  const auto choose = [&] {
    Found<T> found = put_together(parts);
    if (!clamp_extremes(sum, &found)) return false;
    update_statistics(found, buffers, settings);
    choose_qparams(buffers, settings);
    const QParamsConfig& q = settings.qparams;
    params.emplace(n, buffers.scale, buffers.zero_point, q.quant_min, q.quant_max);
    return true;
  };
  const auto quantize = [&](int64_t begin, int64_t end) {
    kernels_of(S{}).fake_quantize_clamped_sum(sum, static_cast<S*>(y), mask, begin, end, params->get());
  };
  in_two_passes(n, piece_count(n), read, choose, quantize);
  return params.has_value();
}

}  // namespace

void observe_clamped_sum(const SumOfTensors& x, const FusedBuffers& buffers, const ObserveSettings& settings) {
  check_counts(buffers);
  if (x.a.numel() > 0) {
    with_stored_type(x.a.type, [&](auto stored) {
      update_statistics(observed<decltype(stored)>(x, settings.nonfinite), buffers, settings);
    });
  }
  choose_qparams(buffers, settings);
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

void observe_fake_quantize_clamped_sum(const SumOfTensors& x, const FusedBuffers& buffers,
                                       const ObserveSettings& settings, void* y, uint64_t* mask) {
  check_counts(buffers);
  const bool done = piece_count(x.a.numel()) > 1 && with_stored_type(x.a.type, [&](auto stored) {
                      return observed_and_quantized<decltype(stored)>(x, buffers, settings, y, mask);
                    });
  if (done) return;
  observe_clamped_sum(x, buffers, settings);
  const QParamsConfig& q = settings.qparams;
  fake_quantize_clamped_sum(x, buffers.scale, buffers.zero_point, q.quant_min, q.quant_max, y, mask);
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
