// The clamped sum of two tensors, observed and fake-quantized.
#include "../math/clamped_sum.h"
#include "fake_quantize.cuh"
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

constexpr int kThreads = 256;

struct SumArgs {
  const void* b;
  double low, high;
};

struct SumMinMaxArgs {
  MinMaxArgs minmax;  // its x is the first summand
  SumArgs sum;
};

// The clamped sum of two elements.
template <class S>
class Sum {
 public:
  using T = Compute<S>;

  __device__ explicit Sum(const SumArgs& args)
      : clamp_{bound_of_sum<S>(args.low), bound_of_sum<S>(args.high)} {}

  __device__ S operator()(S a, S b) const {
    S sum;
    from_compute(&sum, clamp_.value(static_cast<const S*>(nullptr), to_compute(a), to_compute(b)));
    return sum;
  }

  // Whether the gradient passes, by the clamped sum.
  __device__ bool passes(S sum) const { return clamp_.passes(to_compute(sum)); }

 private:
  ClampedSum<Cuda<T>> clamp_;
};

// A Source of MinMaxOf (see observe.cuh).
template <class Stored>
class Sums {
 public:
  using Args = SumMinMaxArgs;
  using S = Stored;
  struct Loaded {
    Pack<S> a, b;
  };

  __device__ Sums(const Args& args, const int64_t (&)[1])
      : sum_(args.sum), a_(static_cast<const S*>(args.minmax.x)), b_(static_cast<const S*>(args.sum.b)) {}

  __device__ Loaded load(int64_t i) const { return {load_whole<Pack<S>>(a_ + i), load_whole<Pack<S>>(b_ + i)}; }
  __device__ S at(const Loaded& loaded, int j, int) const { return sum_(loaded.a.at(j), loaded.b.at(j)); }
  __device__ S one(int64_t i, int) const { return sum_(a_[i], b_[i]); }

 private:
  Sum<S> sum_;
  const S *a_, *b_;
};

struct QuantizeSumArgs {
  QuantizeArgs quantize;  // of a
  SumArgs sum;
  bool aligned;  // b is 16-byte aligned
};

template <class S>
__global__ void __launch_bounds__(kThreads) quantize_sum(const __grid_constant__ QuantizeSumArgs args) {
  const QuantizeArgs& a = args.quantize;
  const int64_t first = first_in_tile<S>(blockIdx.x, kThreads);
  Pack<S> b[kAccesses];
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    b[u] = load_some<S>(args.sum.b, first + u * access_stride<S>(), a.numel, args.aligned);
  }
  Share<S> y = load_share<S>(a, first);
  const Sum<S> sum(args.sum);
  const auto params = params_of<Compute<S>>(a, 0);
  const auto quantizer = quantizer_of(params);
  const bool enabled = is_on(a.enabled);
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) {
      const S value = sum(y.packs[u].at(j), b[u].at(j));
      Outcome<S> outcome = {value, true};
      if (enabled) outcome = params.exact ? quantized_exactly(value, a, 0) : quantized(value, quantizer);
      y.packs[u].put(j, outcome.y);
      bits |= static_cast<unsigned>(outcome.inside && sum.passes(value)) << j;
    }
    store_outcome(a, first + u * access_stride<S>(), y.packs[u], bits);
  }
}

void reduce_minmax_of_sum(Launcher& launcher, const SumOfTensors& x, const MinMaxArgs& minmax) {
  with_stored_type(x.a.type, [&](auto stored) {
    using S = decltype(stored);
    launch_rows<MinMaxOf<Sums<S>, 1>>(launcher, x.a, alignment_of<S>({x.a.data, x.b}),
                                      {minmax, {x.b, x.low, x.high}});
  });
}

}  // namespace

void add_observe_and_fake_quantize(Launcher& launcher, const SumOfTensors& x, Flag observes, Flag quantizes,
                                   const ObserveBuffers& buffers, const QParamBuffers& qparams,
                                   std::optional<double> averaging_constant, const QParamsConfig& config,
                                   NonFinite policy, void* y, uint64_t* mask) {
  const QuantizeArgs quantize = quantize_args(x.a, quantizes, qparams.scale, qparams.zero_point,
                                              {config.quant_min, config.quant_max}, y, mask);
  if (quantize.numel == 0) {
    observe_qparams(launcher, x.a, observes, buffers, qparams, averaging_constant, config, policy);
    return;
  }
  MinMaxArgs minmax = minmax_args(x.a, observes, buffers, averaging_constant, policy);
  add_qparams(qparams, config, &minmax.statistics);
  if (policy == NonFinite::raise) {
    refuse_counted(launcher, [&](int64_t* left_out) {
      reduce_minmax_of_sum(launcher, x, counting_args(x.a, observes, left_out));
    });
  }
  reduce_minmax_of_sum(launcher, x, minmax);
  with_stored_type(x.a.type, [&](auto stored) {
    using S = decltype(stored);
    constexpr int64_t kTile = tile_elements<S>(kThreads);
    launch(launcher, quantize_sum<S>, (quantize.numel + kTile - 1) / kTile, kThreads, 0,
           QuantizeSumArgs{quantize, {x.b, x.low, x.high}, is_aligned(x.b)});
  });
}

}  // namespace fastquant::cuda
