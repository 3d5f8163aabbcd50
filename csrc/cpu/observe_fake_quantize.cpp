// Observing and fake-quantizing a tensor as one operation.
#include "extremes.h"
#include "fake_quantize.h"
#include "locks.h"
#include "quant_params.h"
#include "statistics.h"
#include "two_passes.h"

namespace fastquant {
namespace {

// observe_fake_quantize in one parallel region, for a tensor of one channel. Returns false, and has changed
// nothing, if x has elements that are not finite.
template <class S>
bool observed_and_quantized(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings,
                            void* y, uint64_t* mask) {
  using T = Compute<S>;
  for (const Array* a : {&buffers.min_val, &buffers.max_val, &buffers.scale, &buffers.zero_point})
    check_count(*a, 1);
  struct Found {
    T low, high;
    bool nonfinite;
  };
  const auto& table = kernels_of(S{});
  const auto* const from = static_cast<const S*>(x.data);
  const int64_t n = x.numel();
  std::vector<Found> found(pass_pieces(n));
  std::optional<TensorParams<T>> params;
  const auto read = [&](int64_t piece, int64_t begin, int64_t end) {
    Found& here = found[piece];
    table.minmax(from + begin, end - begin, &here.low, &here.high, &here.nonfinite);
  };
  const auto choose = [&] {
    Extremes<T> extremes(1);
    for (const Found& part : found) {
      if (part.nonfinite) return false;
      extremes.fold(0, part.low, part.high);
    }
    {
      const auto lock = locked(buffers.min_val);
      update_range(extremes, settings.averaging_constant, buffers.min_val, buffers.max_val);
    }
    const QParamsConfig& q = settings.qparams;
    choose_qparams(buffers.min_val, buffers.max_val, buffers.eps, q, buffers.scale, buffers.zero_point);
    params.emplace(n, buffers.scale, buffers.zero_point, q.quant_min, q.quant_max);
    return true;
  };
  const auto quantize = [&](int64_t begin, int64_t end) {
    table.fake_quantize_rows(from, static_cast<S*>(y), mask, begin, end, params->get());
  };
  in_two_passes(n, piece_count(n), read, choose, quantize);
  return params.has_value();
}

}  // namespace

void observe_fake_quantize(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings,
                           void* y, uint64_t* mask) {
  const bool done = x.channels == 1 && piece_count(x.numel()) > 1 && with_stored_type(x.type, [&](auto stored) {
                      return observed_and_quantized<decltype(stored)>(x, buffers, settings, y, mask);
                    });
  if (done) return;
  observe_qparams(x, buffers, settings);
  const QParamsConfig& q = settings.qparams;
  fake_quantize(x, buffers.scale, buffers.zero_point, q.quant_min, q.quant_max, y, mask);
}

}  // namespace fastquant
