// Fake-quantize, alone and after observing, and its straight-through gradient.
#include "fake_quantize.cuh"
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSmallThreads = 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // shared memory that a block may use on every device

// ------------------------------------------------------------------------- fake-quantize

template <class S>
__global__ void __launch_bounds__(kThreads) quantize_tensor(const __grid_constant__ QuantizeArgs a) {
  quantize_one_channel<S>(a, first_in_tile<S>(blockIdx.x, kThreads));
}

template <class S>
__global__ void __launch_bounds__(kThreads, 3) quantize_channels_of(const __grid_constant__ QuantizeArgs a) {
  quantize_channels<S>(a, blockIdx.x, gridDim.x, kThreads, shared_memory<Compute<S>>());
}

template <class S>
size_t table_bytes(int64_t channels) {
  return Table<Compute<S>>::kParams * sizeof(Compute<S>) * static_cast<size_t>(channels);
}

void launch_quantize(Launcher& launcher, const Dense& x, QuantizeArgs a) {
  if (a.numel == 0) return;
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    constexpr int64_t kTile = tile_elements<S>(kThreads);
    const int64_t tiles = (a.numel + kTile - 1) / kTile;
    if (x.channels == 1) {
      launch(launcher, quantize_tensor<S>, tiles, kThreads, 0, a);
      return;
    }
    constexpr int64_t kLongSegment = 64;  // from this length on, parameters are read from global memory
    a.tabulates = x.inner < kLongSegment && table_bytes<S>(x.channels) <= kSharedBytes;
    // Filling a table costs time, so fewer blocks are launched, each of which does more tiles.
    const int64_t blocks = a.tabulates ? std::min(tiles, int64_t{4} * launcher.multiprocessors()) : tiles;
    launch(launcher, quantize_channels_of<S>, blocks, kThreads, a.tabulates ? table_bytes<S>(x.channels) : 0,
           a);
  });
}

// ------------------------------------------------------------ small tensors, in one block

// Limits up to which one block observes and fake-quantizes a whole tensor in a single launch.
constexpr int64_t kSmallBytes = 64 * 1024;
constexpr int64_t kSmallChannels = 1024;

template <class S>
__global__ void __launch_bounds__(kSmallThreads)
    small_tensor(const __grid_constant__ MinMaxArgs minmax, const __grid_constant__ RowGrid grid,
                 const __grid_constant__ QuantizeArgs quantize) {
  using Op = MinMax<S, 1>;
  using P = typename Op::Partial;
  const int thread = static_cast<int>(threadIdx.x);
  if (is_on(minmax.enabled)) {
    Op op(minmax, {0});
    fold_rows(&op, grid, 0, 0, 1, thread, kSmallThreads);
    op.leave(minmax);
    const P p = over_block(op.partial(0), shared_memory<P>());
    if (thread == 0) Op::finish(minmax, 0, p);
    __syncthreads();
  }
  for (int64_t tile = 0; tile * tile_elements<S>(kSmallThreads) < padded_elements(quantize.numel); ++tile) {
    quantize_one_channel<S>(quantize, first_in_tile<S>(tile, kSmallThreads));
  }
}

template <class S>
__global__ void __launch_bounds__(kSmallThreads)
    small_channels(const __grid_constant__ MinMaxArgs minmax, const __grid_constant__ RowGrid grid,
                   const __grid_constant__ QuantizeArgs quantize) {
  using Op = MinMax<S, 1>;
  using P = typename Op::Partial;
  const int thread = static_cast<int>(threadIdx.x), channels = static_cast<int>(grid.channels);
  if (is_on(minmax.enabled)) {
    // `mates` adjacent lanes reduce one channel: about as many as it has slots, at most a warp. Then each
    // channel's statistics are updated by one thread.
    P* parts = shared_memory<P>();
    int mates = 1;
    while (mates < kWarp && mates < grid.slots) mates *= 2;
    for (int64_t first = 0; first < channels; first += kSmallThreads / mates) {
      const int64_t channel = first + thread / mates;
      Op op(minmax, {channel});
      if (channel < channels) fold_rows(&op, grid, channel, 0, 1, thread % mates, mates);
      op.leave(minmax);
      P p = op.partial(0);
      for (int offset = mates / 2; offset > 0; offset /= 2) p = P::both(p, shuffle_xor(p, offset));
      if (channel < channels && thread % mates == 0) parts[channel] = p;
    }
    __syncthreads();
    for (int channel = thread; channel < channels; channel += kSmallThreads) {
      Op::finish(minmax, channel, parts[channel]);
    }
    __syncthreads();
  }
  quantize_channels<S>(quantize, 0, 1, kSmallThreads, shared_memory<Compute<S>>());
}

template <class S>
void launch_small(Launcher& launcher, const Dense& x, const MinMaxArgs& minmax, QuantizeArgs quantize) {
  using P = typename MinMax<S, 1>::Partial;
  Alignment alignment = alignment_of<S>({x.data});
  // If segments are short, few slots are entirely in one, so all elements are read one at a time.
  alignment.alike = alignment.alike && x.inner >= 2 * Pack<S>::N;
  quantize.tabulates = x.channels > 1 && table_bytes<S>(x.channels) <= kSharedBytes;
  size_t shared = sizeof(P) * static_cast<size_t>(std::max<int64_t>(x.channels, kSmallThreads / kWarp));
  if (quantize.tabulates) shared = std::max(shared, table_bytes<S>(x.channels));
  launch(launcher, x.channels == 1 ? small_tensor<S> : small_channels<S>, 1, kSmallThreads, shared, minmax,
         row_grid<S>(x, alignment), quantize);
}

// ------------------------------------------------------------------------------- weights

struct WeightArgs {
  const float* x;
  int8_t* out;
  int64_t numel;
  Divider inner, channels;
  Buffer scale;
  float low, high;
};

// Weights are quantized only once, at conversion, so one element per thread is fast enough.
__global__ void __launch_bounds__(kThreads) quantize_weight(const __grid_constant__ WeightArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.numel) return;
  const int64_t row = a.inner.quotient(i);
  const int64_t channel = row - a.channels.quotient(row) * a.channels.divisor();
  const float inverse_scale = reciprocal(read<float>(a.scale, channel), false);
  a.out[i] = quantized_to_int8(a.x[i], inverse_scale, a.low, a.high);
}

// ----------------------------------------------------------------------------- gradients

struct GradientArgs {
  const void* grad;
  void* out;
  const uint32_t* mask;
  int64_t numel;
  bool aligned;
};

template <class S>
__global__ void __launch_bounds__(kThreads) mask_tile(const __grid_constant__ GradientArgs a) {
  using T = Compute<S>;
  const int64_t first = first_in_tile<S>(blockIdx.x, kThreads);
  Pack<S> grad[kAccesses];
  unsigned bits[kAccesses];
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    const int64_t i = first + u * access_stride<S>();
    grad[u] = load_some<S>(a.grad, i, a.numel, a.aligned);
    bits[u] = i < a.numel ? a.mask[i / 32] >> (i % 32) : 0;
  }
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    // Torch multiplies the gradient by the mask. Selecting would differ for NaN and for the sign of zero.
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) {
      S product;
      from_compute(&product, to_compute(grad[u].at(j)) * static_cast<T>(bits[u] >> j & 1u));
      grad[u].put(j, product);
    }
    store_some(a.out, first + u * access_stride<S>(), a.numel, grad[u]);
  }
}

}  // namespace

void fake_quantize(Launcher& launcher, const Dense& x, Flag enabled, const Array& scale,
                   const Array& zero_point, QuantRange range, void* y, uint64_t* mask) {
  launch_quantize(launcher, x, quantize_args(x, enabled, scale, zero_point, range, y, mask));
}

void quantize_per_channel(Launcher& launcher, const Dense& x, const Array& scale, QuantRange range,
                          int8_t* out) {
  check_count(scale, x.channels);
  check(x.type == Element::f32, "x must be float32");
  check_int8_range(range.min, range.max);
  if (x.numel() == 0) return;
  WeightArgs a = {};
  a.x = static_cast<const float*>(x.data);
  a.out = out;
  a.numel = x.numel();
  a.inner = Divider(x.inner);
  a.channels = Divider(x.channels);
  a.scale = Buffer(scale);
  a.low = static_cast<float>(range.min);
  a.high = static_cast<float>(range.max);
  launch(launcher, quantize_weight, (a.numel + kThreads - 1) / kThreads, kThreads, 0, a);
}

void learnable_fake_quantize(Launcher& launcher, const Dense& x, const Array& scale, const Array& zero_point,
                             QuantRange range, void* y) {
  QuantizeArgs a = quantize_args(x, Flag(), scale, zero_point, range, y, nullptr);
  a.rounds_zero_point = true;
  launch_quantize(launcher, x, a);
}

void observe_and_fake_quantize(Launcher& launcher, const Dense& x, Flag observes, Flag quantizes,
                               const ObserveBuffers& buffers, const QParamBuffers& qparams,
                               std::optional<double> averaging_constant, const QParamsConfig& config,
                               NonFinite policy, void* y, uint64_t* mask) {
  const QuantRange range = {config.quant_min, config.quant_max};
  const int64_t element_bytes = x.type == Element::f64 ? 8 : (x.type == Element::f32 ? 4 : 2);
  const bool small = x.numel() * element_bytes <= kSmallBytes && x.channels <= kSmallChannels;
  if (x.numel() == 0 || !small) {
    observe_qparams(launcher, x, observes, buffers, qparams, averaging_constant, config, policy);
    fake_quantize(launcher, x, quantizes, qparams.scale, qparams.zero_point, range, y, mask);
    return;
  }
  MinMaxArgs minmax = minmax_args(x, observes, buffers, averaging_constant, policy);
  add_qparams(qparams, config, &minmax.statistics);
  const QuantizeArgs quantize = quantize_args(x, quantizes, qparams.scale, qparams.zero_point, range, y, mask);
  if (policy == NonFinite::raise) refuse_nonfinite(launcher, x, observes);
  with_stored_type(x.type, [&](auto stored) { launch_small<decltype(stored)>(launcher, x, minmax, quantize); });
}

void mask_gradient(Launcher& launcher, const Dense& grad, const uint64_t* mask, void* out) {
  check(is_aligned(out), "the gradient is not aligned");
  const GradientArgs a = {grad.data, out, reinterpret_cast<const uint32_t*>(mask), grad.numel(),
                          is_aligned(grad.data)};
  with_stored_type(grad.type, [&](auto stored) {
    using S = decltype(stored);
    constexpr int64_t kTile = tile_elements<S>(kThreads);
    launch(launcher, mask_tile<S>, (a.numel + kTile - 1) / kTile, kThreads, 0, a);
  });
}

}  // namespace fastquant::cuda
