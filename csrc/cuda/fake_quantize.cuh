// Device code that fake-quantizes a tensor in memory order. A block processes one tile of contiguous
// elements at a time.
#pragma once

#include "../math/fake_quantize.h"
#include "reduce.cuh"

namespace fastquant::cuda {
namespace {

struct QuantizeArgs {
  const void* x;
  void* y;
  uint32_t* mask;  // may be null
  int64_t numel;
  Divider inner, channels;
  Buffer scale, zero_point;
  Flag enabled;
  int64_t quant_min, quant_max;
  bool rounds_zero_point;  // the zero point is a learnable float, to be rounded before it is used
  bool aligned;            // x is 16-byte aligned; y always is
  bool tabulates;          // each block copies the parameters of all channels to shared memory
};

inline QuantizeArgs quantize_args(const Dense& x, Flag enabled, const Array& scale, const Array& zero_point,
                                  QuantRange range, void* y, uint64_t* mask) {
  check_count(scale, x.channels);
  check_count(zero_point, x.channels);
  check(is_aligned(y), "y is not aligned");
  QuantizeArgs a = {};
  a.x = x.data;
  a.y = y;
  a.mask = reinterpret_cast<uint32_t*>(mask);
  a.numel = x.numel();
  a.inner = Divider(std::max<int64_t>(x.inner, 1));
  a.channels = Divider(std::max<int64_t>(x.channels, 1));
  a.scale = Buffer(scale);
  a.zero_point = Buffer(zero_point);
  a.enabled = enabled;
  a.quant_min = range.min;
  a.quant_max = range.max;
  a.aligned = is_aligned(x.data);
  return a;
}

constexpr int kAccesses = 4;  // 16-byte accesses per thread and tile, all issued before the first is used

// Number of elements in the tile of a block. The elements that one warp processes are contiguous.
template <class S>
FASTQUANT_HD constexpr int64_t tile_elements(int threads) {
  return int64_t{threads} * kAccesses * Pack<S>::N;
}

// Number of elements between the successive accesses of a thread.
template <class S>
FASTQUANT_HD constexpr int access_stride() {
  return kWarp * Pack<S>::N;
}

// Index of the first element of a tile that this thread processes.
template <class S>
__device__ int64_t first_in_tile(int64_t tile, int threads) {
  const int thread = static_cast<int>(threadIdx.x);
  return tile * tile_elements<S>(threads) + thread / kWarp * kAccesses * access_stride<S>() +
         thread % kWarp * Pack<S>::N;
}

// The mask is written in whole 64-bit words, so this many bits are written for numel elements.
FASTQUANT_HD inline int64_t padded_elements(int64_t numel) { return (numel + 63) / 64 * 64; }

// ---------------------------------------------------------------------------- parameters

__device__ inline bool has_float_zero_point(const QuantizeArgs& a) {
  return !a.rounds_zero_point && a.zero_point.type != Element::i32 && a.zero_point.type != Element::i64;
}

template <class T>
__device__ ChannelParams<T> params_of(const QuantizeArgs& a, int64_t channel) {
  const T zero_point =
      a.rounds_zero_point
          ? static_cast<T>(rounded_zero_point(read<double>(a.zero_point, channel), a.quant_min, a.quant_max))
          : read<T>(a.zero_point, channel);
  return channel_params<T>(read<T>(a.scale, channel), a.scale.type == Element::f64, zero_point,
                           has_float_zero_point(a), a.quant_min, a.quant_max);
}

template <class T>
__device__ FakeQuantizer<Cuda<T>> quantizer_of(const ChannelParams<T>& p) {
  return {p.scale, p.inverse_scale, p.low, p.high, p.low_edge, p.high_edge};
}

// The parameters of FakeQuantizer for all channels, one array per parameter, in shared memory.
template <class T>
class Table {
 public:
  static constexpr int kParams = 6;

  __device__ Table(T* values, int64_t channels) : values_(values), channels_(channels) {}

  // Must be called by all threads of a block. Returns whether any channel needs ExactQuantizer.
  __device__ bool fill(const QuantizeArgs& a) {
    bool exact = false;
    for (int64_t c = threadIdx.x; c < channels_; c += blockDim.x) {
      const auto p = params_of<T>(a, c);
      exact |= p.exact;
      const T params[kParams] = {p.scale, p.inverse_scale, p.low, p.high, p.low_edge, p.high_edge};
#pragma unroll
      for (int k = 0; k < kParams; ++k) values_[k * channels_ + c] = params[k];
    }
    return __syncthreads_or(exact) != 0;
  }

  __device__ FakeQuantizer<Cuda<T>> at(int64_t c) const {
    const auto param = [&](int k) { return values_[k * channels_ + c]; };
    return {param(0), param(1), param(2), param(3), param(4), param(5)};
  }

  // Loads the quantizers of the channels [c, c + kSuccessive) with 16-byte accesses. c and the number of
  // channels must be multiples of kSuccessive.
  static constexpr int kSuccessive = sizeof(T) == sizeof(float) ? 4 : 2;

  __device__ void successive(int64_t c, FakeQuantizer<Cuda<T>> (&quantizers)[kSuccessive]) const {
    struct alignas(16) Values {
      T at[kSuccessive];
    };
    Values params[kParams];
#pragma unroll
    for (int k = 0; k < kParams; ++k) params[k] = load_whole<Values>(values_ + k * channels_ + c);
#pragma unroll
    for (int j = 0; j < kSuccessive; ++j) {
      quantizers[j] = {params[0].at[j], params[1].at[j], params[2].at[j],
                       params[3].at[j], params[4].at[j], params[5].at[j]};
    }
  }

 private:
  T* values_;
  int64_t channels_;
};

// ------------------------------------------------------------------------------ elements

// A fake-quantized element, and whether it was in the quantized range, where its gradient is kept.
template <class S>
struct Outcome {
  S y;
  bool inside;
};

template <class S, class T>
__device__ Outcome<S> quantized(S x, const FakeQuantizer<Cuda<T>>& q) {
  const T t = q.steps(to_compute(x));
  Outcome<S> outcome;
  from_compute(&outcome.y, q.value(t));
  outcome.inside = q.inside(t);
  return outcome;
}

template <class S>
__device__ __noinline__ Outcome<S> quantized_exactly(S x, const QuantizeArgs& a, int64_t channel) {
  using T = Compute<S>;
  const auto p = params_of<T>(a, channel);
  const ExactQuantizer<Cuda<T>> q = {p.scale,     p.inverse_scale, p.zero_point,
                                     a.quant_min, a.quant_max,     has_float_zero_point(a)};
  Outcome<S> outcome;
  from_compute(&outcome.y, q.value(to_compute(x), &outcome.inside));
  return outcome;
}

// ----------------------------------------------------------------------------- accesses

// Loads up to N elements from index i on, without reading past the end of the tensor.
template <class S>
__device__ Pack<S> load_some(const void* from, int64_t i, int64_t numel, bool aligned) {
  constexpr int N = Pack<S>::N;
  const S* x = static_cast<const S*>(from);
  if (aligned && i + N <= numel) return load_whole<Pack<S>>(x + i);
  Pack<S> pack = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (i + j < numel) pack.put(j, x[i + j]);
  }
  return pack;
}

template <class S>
__device__ void store_some(void* to, int64_t i, int64_t numel, const Pack<S>& pack) {
  constexpr int N = Pack<S>::N;
  S* y = static_cast<S*>(to);
  if (i + N <= numel) {
    store_whole(y + i, pack);
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (i + j < numel) y[i + j] = pack.at(j);
  }
}

// The elements of a tile that one thread processes.
template <class S>
struct Share {
  Pack<S> packs[kAccesses];
};

template <class S>
__device__ Share<S> load_share(const QuantizeArgs& a, int64_t first) {
  Share<S> share;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    share.packs[u] = load_some<S>(a.x, first + u * access_stride<S>(), a.numel, a.aligned);
  }
  return share;
}

// Stores a thread's N elements and their bits of the mask; 32 / N adjacent lanes share one word of the
// mask. Must be called by all lanes of a warp, each lane's elements following those of the lane before.
template <class S>
__device__ void store_outcome(const QuantizeArgs& a, int64_t i, const Pack<S>& y, unsigned bits) {
  constexpr int N = Pack<S>::N, kThreadsOfWord = 32 / N;
  store_some(a.y, i, a.numel, y);
  if (a.mask == nullptr) return;
  if (i + N > a.numel) bits &= i < a.numel ? (1u << (a.numel - i)) - 1 : 0u;
  const int mate = static_cast<int>(threadIdx.x) % kThreadsOfWord;
  unsigned word = bits << (mate * N);
#pragma unroll
  for (int offset = 1; offset < kThreadsOfWord; offset *= 2) word |= __shfl_xor_sync(kAllLanes, word, offset);
  if (mate == 0 && i < padded_elements(a.numel)) a.mask[i / 32] = word;
}

template <class S>
__device__ void store_unchanged(const QuantizeArgs& a, int64_t first, const Share<S>& x) {
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    store_outcome(a, first + u * access_stride<S>(), x.packs[u], (1u << Pack<S>::N) - 1);
  }
}

// ------------------------------------------------------------------ channels of elements

// The channel of an element, and its index in its segment (see reduce.cuh).
struct Place {
  int64_t channel;
  int64_t position;
};

// Computes the places of elements near `first`. Only the constructor divides the full indices, which may
// need slow 64-bit divisions; after() divides positions relative to the place of `first`.
class Places {
 public:
  __device__ Places(const QuantizeArgs& a, int64_t first) : a_(a) {
    const int64_t row = a.inner.quotient(first);
    position_ = first - row * a.inner.divisor();
    channel_ = row - a.channels.quotient(row) * a.channels.divisor();
  }

  // The place of element first + distance.
  __device__ Place after(int64_t distance) const {
    const int64_t position = position_ + distance, rows = a_.inner.quotient(position);
    const int64_t channel = channel_ + rows;
    return {channel - a_.channels.quotient(channel) * a_.channels.divisor(),
            position - rows * a_.inner.divisor()};
  }

  // Changes the place of an element to that of the next element.
  __device__ void advance(Place* place) const {
    if (++place->position < a_.inner.divisor()) return;
    place->position = 0;
    if (++place->channel == a_.channels.divisor()) place->channel = 0;
  }

 private:
  const QuantizeArgs& a_;
  int64_t position_, channel_;
};

// --------------------------------------------------------------------------------- tiles

// These functions fake-quantize a thread's elements of a tile, the first of which has index `first`.

// For parameters that FakeQuantizer does not support, so that elements need ExactQuantizer.
template <class S>
__device__ __noinline__ void quantize_exactly(const QuantizeArgs& a, int64_t first) {
  constexpr int N = Pack<S>::N;
  const Places places(a, first);
  for (int u = 0; u < kAccesses; ++u) {
    const int64_t i = first + u * access_stride<S>();
    const Pack<S> x = load_some<S>(a.x, i, a.numel, a.aligned);
    Place place = places.after(i - first);
    Pack<S> y = {};
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < N; ++j, places.advance(&place)) {
      const auto outcome = quantized_exactly(x.at(j), a, place.channel);
      y.put(j, outcome.y);
      bits |= static_cast<unsigned>(outcome.inside) << j;
    }
    store_outcome(a, i, y, bits);
  }
}

template <class S>
__device__ void quantize_share(const QuantizeArgs& a, int64_t first, Share<S>* x,
                               const FakeQuantizer<Cuda<Compute<S>>>& q) {
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) {
      const auto outcome = quantized(x->packs[u].at(j), q);
      x->packs[u].put(j, outcome.y);
      bits |= static_cast<unsigned>(outcome.inside) << j;
    }
    store_outcome(a, first + u * access_stride<S>(), x->packs[u], bits);
  }
}

// For a tensor with one scale and zero point.
template <class S>
__device__ void quantize_one_channel(const QuantizeArgs& a, int64_t first) {
  // x is loaded first, so that these loads overlap with reading the flag and the parameters.
  Share<S> x = load_share<S>(a, first);
  if (!is_on(a.enabled)) {
    store_unchanged(a, first, x);
    return;
  }
  const auto params = params_of<Compute<S>>(a, 0);
  if (params.exact) {
    quantize_exactly<S>(a, first);
  } else {
    quantize_share(a, first, &x, quantizer_of(params));
  }
}

// For per-channel parameters that are in a table in shared memory.
template <class S>
__device__ void quantize_by_table(const QuantizeArgs& a, int64_t first, const Table<Compute<S>>& table) {
  using T = Compute<S>;
  constexpr int N = Pack<S>::N;
  Share<S> x = load_share<S>(a, first);
  const Places places(a, first);
  const bool successive = a.inner.divisor() == 1 && a.channels.divisor() % N == 0;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    Place place = places.after(u * access_stride<S>());
    unsigned bits = 0;
    const auto quantize = [&](int j, const FakeQuantizer<Cuda<T>>& q) {
      const auto outcome = quantized(x.packs[u].at(j), q);
      x.packs[u].put(j, outcome.y);
      bits |= static_cast<unsigned>(outcome.inside) << j;
    };
    if (successive) {
      constexpr int M = Table<T>::kSuccessive;
#pragma unroll
      for (int from = 0; from < N; from += M) {
        FakeQuantizer<Cuda<T>> quantizers[M];
        table.successive(place.channel + from, quantizers);
#pragma unroll
        for (int j = 0; j < M; ++j) quantize(from + j, quantizers[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j, places.advance(&place)) quantize(j, table.at(place.channel));
    }
    store_outcome(a, first + u * access_stride<S>(), x.packs[u], bits);
  }
}

// For per-channel parameters that are read from global memory: segments are long, so a thread meets few
// channels.
template <class S>
__device__ void quantize_by_segment(const QuantizeArgs& a, int64_t first) {
  using T = Compute<S>;
  constexpr int N = Pack<S>::N, kReach = (kAccesses - 1) * access_stride<S>() + N;
  Share<S> x = load_share<S>(a, first);
  const Places places(a, first);
  const Place start = places.after(0);
  auto params = params_of<T>(a, start.channel);
  auto q = quantizer_of(params);
  // one_channel may differ between the lanes of a warp, so both branches below must reach the same
  // call of store_outcome: its shuffles need all lanes.
  const bool one_channel = start.position + kReach <= a.inner.divisor() && !params.exact;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    unsigned bits = 0;
    if (one_channel) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const auto outcome = quantized(x.packs[u].at(j), q);
        x.packs[u].put(j, outcome.y);
        bits |= static_cast<unsigned>(outcome.inside) << j;
      }
    } else {
      Place place = places.after(u * access_stride<S>());
      int64_t channel = -1;
#pragma unroll
      for (int j = 0; j < N; ++j, places.advance(&place)) {
        if (place.channel != channel) {
          channel = place.channel;
          params = params_of<T>(a, channel);
          q = quantizer_of(params);
        }
        const auto outcome =
            params.exact ? quantized_exactly(x.packs[u].at(j), a, channel) : quantized(x.packs[u].at(j), q);
        x.packs[u].put(j, outcome.y);
        bits |= static_cast<unsigned>(outcome.inside) << j;
      }
    }
    store_outcome(a, first + u * access_stride<S>(), x.packs[u], bits);
  }
}

// Fake-quantizes every `blocks`-th tile, from tile `block` on, of a tensor with per-channel parameters, by
// one block of `threads` threads. `shared` is shared memory for the table, if a.tabulates.
template <class S>
__device__ void quantize_channels(const QuantizeArgs& a, int64_t block, int64_t blocks, int threads,
                                  Compute<S>* shared) {
  const int64_t tile_size = tile_elements<S>(threads);
  const int64_t tiles = (padded_elements(a.numel) + tile_size - 1) / tile_size;
  if (!is_on(a.enabled)) {
    for (int64_t tile = block; tile < tiles; tile += blocks) {
      const int64_t first = first_in_tile<S>(tile, threads);
      store_unchanged(a, first, load_share<S>(a, first));
    }
    return;
  }
  if (!a.tabulates) {
    for (int64_t tile = block; tile < tiles; tile += blocks) {
      quantize_by_segment<S>(a, first_in_tile<S>(tile, threads));
    }
    return;
  }
  Table<Compute<S>> table(shared, a.channels.divisor());
  const bool exact = table.fill(a);
  for (int64_t tile = block; tile < tiles; tile += blocks) {
    if (exact) {
      quantize_exactly<S>(a, first_in_tile<S>(tile, threads));
    } else {
      quantize_by_table<S>(a, first_in_tile<S>(tile, threads), table);
    }
  }
}

}  // namespace
}  // namespace fastquant::cuda
