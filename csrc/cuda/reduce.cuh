// One pass over a tensor that reduces every channel, in one launch: rows for long stretches of
// one channel, columns for short ones. What is reduced, an Op says:
//
//   Args                  what its constructor needs; passed to the kernel
//   S                     the type of the elements
//   Partial               what a stretch of a channel gives; see device.cuh
//   Op(args, channels)    what one thread folds, kColumns channels at a time
//   load(i)               the Pack::N elements from i on, which lie on a 16-byte boundary; not yet
//                         waited for
//   fold(loaded, i)       takes them: all into one channel, or one into each
//   fold_one(i, column)   takes one element
//   partial(column)       what it has by now
//   leave(args)           called once by whole warps, at the end
//   finish(args, channel, partial)   called once a channel, by one thread
//   static begins(args)   whether there is anything to do
#pragma once

#include "device.cuh"

namespace fastquant::cuda {
namespace {

// How the operands lie: `shift` elements from 16-byte boundaries, or not alike.
struct Alignment {
  int shift;
  bool alike;
};

template <class S>
Alignment alignment_of(std::initializer_list<const void*> operands) {
  const auto shift = [](const void* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
  };
  Alignment a = {shift(*operands.begin()), true};
  for (const void* p : operands) a.alike = a.alike && shift(p) == a.shift;
  return a;
}

// ---------------------------------------------------------------------------------- rows

// A channel is `outer` segments of `inner` neighbours. Each segment is covered by slots of one
// 16-byte access; those at its ends may reach beyond it.
struct RowGrid {
  int64_t channels, inner;
  int64_t slots;       // of a channel
  Divider by_segment;  // slots of a segment
  int shift;           // elements from a 16-byte boundary to the first
  bool packs;          // whether slots lie on such boundaries; else they are read element by element
  bool warps;          // a warp for each channel, instead of a block
  int splits;          // blocks that share a channel
};

constexpr int kRowThreads = 256;

// A slot covers the elements [begin, begin + N) as far as they are in its segment.
struct Slot {
  int64_t segment, begin;
};

template <int N>
__device__ Slot slot_at(const RowGrid& g, int64_t channel, int64_t index) {
  // Mostly there is one segment only, and nothing to divide.
  const int64_t row = g.slots == g.by_segment.divisor() ? 0 : g.by_segment.quotient(index);
  const int64_t segment = (row * g.channels + channel) * g.inner;
  const int64_t before = g.packs ? (segment + g.shift) & (N - 1) : 0;
  return {segment, segment - before + (index - row * g.by_segment.divisor()) * N};
}

// Folds the slots of a channel, `round` by round: in each, kUnroll for every lane.
template <class Op>
__device__ void fold_rows(Op* op, const RowGrid& g, int64_t channel, int64_t first_round, int64_t rounds,
                          int lane, int lanes) {
  constexpr int N = Pack<typename Op::S>::N, U = Op::kUnroll;
  for (int64_t base = first_round * lanes * U; base < g.slots; base += rounds * lanes * U) {
    typename Op::Loaded loaded[U];
    int64_t begin[U];
    unsigned whole = 0;  // a bit for each slot that is read at once, being all in its segment
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t index = base + u * lanes + lane;
      if (index >= g.slots) continue;
      const Slot slot = slot_at<N>(g, channel, index);
      begin[u] = slot.begin;
      if (!g.packs || slot.begin < slot.segment || slot.begin + N > slot.segment + g.inner) continue;
      whole |= 1u << u;
      loaded[u] = op->load(begin[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (whole >> u & 1u) op->fold(loaded[u], begin[u]);
    }
    if (whole == (1u << U) - 1) continue;
#pragma unroll 1
    for (int u = 0; u < U; ++u) {
      const int64_t index = base + u * lanes + lane;
      if ((whole >> u & 1u) || index >= g.slots) continue;
      const Slot slot = slot_at<N>(g, channel, index);
      const int64_t end = slot.segment + g.inner;
      for (int64_t i = slot.begin; i < slot.begin + N; ++i) {
        if (i >= slot.segment && i < end) op->fold_one(i, 0);
      }
    }
  }
}

template <class P>
struct RowShared {
  P warps[kRowThreads / kWarp];
  bool last;
};

template <class Op>
__global__ void __launch_bounds__(kRowThreads)
    reduce_rows(const __grid_constant__ typename Op::Args args, const __grid_constant__ RowGrid g,
                typename Op::Partial* partials, unsigned* tickets) {
  using P = typename Op::Partial;
  if (!Op::begins(args)) return;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (g.warps) {
    const int64_t channel = int64_t{block} * (kRowThreads / kWarp) + thread / kWarp;
    if (channel >= g.channels) return;
    Op op(args, {channel});
    fold_rows(&op, g, channel, 0, 1, thread % kWarp, kWarp);
    op.leave(args);
    const P p = over_warp(op.partial(0));
    if (thread % kWarp == 0) Op::finish(args, channel, p);
    return;
  }
  auto* shared = shared_memory<RowShared<P>>();
  const int64_t channel = block / g.splits;
  const int split = block % g.splits;
  Op op(args, {channel});
  fold_rows(&op, g, channel, split, g.splits, thread, kRowThreads);
  op.leave(args);
  P p = over_block(op.partial(0), shared->warps);
  if (g.splits > 1) {
    P* parts = partials + channel * g.splits;
    if (thread == 0) parts[split] = p;
    if (!arrives_last(tickets + channel, g.splits, &shared->last)) return;
    p = P::nothing();
    for (int s = thread; s < g.splits; s += kRowThreads) p = P::both(p, read_fresh(parts + s));
    p = over_block(p, shared->warps);
  }
  if (thread == 0) Op::finish(args, channel, p);
}

template <class S>
RowGrid row_grid(const Dense& x, Alignment alignment) {
  constexpr int N = Pack<S>::N;
  RowGrid g;
  g.channels = x.channels;
  g.inner = x.inner;
  g.packs = alignment.alike;
  g.shift = alignment.shift;
  // One more where segments may begin anywhere between boundaries.
  const bool aligned = !g.packs || (g.shift == 0 && (x.inner % N == 0 || x.outer * x.channels == 1));
  const int64_t segment = (x.inner + N - 1) / N + (aligned ? 0 : 1);
  g.slots = x.outer * segment;
  g.by_segment = Divider(segment);
  g.warps = false;
  g.splits = 1;
  return g;
}

template <class Op>
void launch_rows(Launcher& launcher, const Dense& x, Alignment alignment, const typename Op::Args& args) {
  using P = typename Op::Partial;
  constexpr int kBlocksWanted = 4;                                // of a multiprocessor
  constexpr int64_t kRound = int64_t{kRowThreads} * Op::kUnroll;  // slots that a block has in flight
  RowGrid g = row_grid<typename Op::S>(x, alignment);
  g.warps = x.channels > 1 && g.slots <= kRound / 4;
  int64_t blocks = x.channels;
  P* partials = nullptr;
  unsigned* tickets = nullptr;
  if (g.warps) {
    blocks = (x.channels + kRowThreads / kWarp - 1) / (kRowThreads / kWarp);
  } else if (x.channels <= kMaxTickets) {
    const int64_t wanted = (launcher.multiprocessors() * int64_t{kBlocksWanted} + x.channels - 1) / x.channels;
    g.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, (g.slots + kRound - 1) / kRound)));
    blocks = x.channels * g.splits;
  }
  if (g.splits > 1) {
    partials = static_cast<P*>(launcher.scratch(sizeof(P) * static_cast<size_t>(blocks)));
    tickets = launcher.tickets(x.channels);
  }
  launch(launcher, reduce_rows<Op>, blocks, kRowThreads, sizeof(RowShared<P>), args, g, partials, tickets);
}

// ------------------------------------------------------------------------------- columns

// Memory as rows of `width` columns, the last row cut short. Each column is one channel's; a
// thread keeps to Pack::N columns and walks down the rows. Tiles of columns share no channel.
struct ColumnGrid {
  int64_t numel;
  int64_t rows, width;
  int64_t inner, channels;
  int64_t tiles;
  int tile;    // columns of a tile, but perhaps the last
  int splits;  // blocks that share a tile
  bool packs;  // whether a thread's columns are neighbours, on 16-byte boundaries
};

template <class Op, int kThreads>
struct ColumnShared {
  using P = typename Op::Partial;
  static constexpr int kTile = kWarp * Pack<typename Op::S>::N;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kParts = kWarps / 2 * kTile > kThreads ? kWarps / 2 * kTile : kThreads;

  P parts[kParts];
  bool last;
};

template <class Op, int kThreads>
__global__ void __launch_bounds__(kThreads)
    reduce_columns(const __grid_constant__ typename Op::Args args, const __grid_constant__ ColumnGrid g,
                   typename Op::Partial* partials, unsigned* tickets) {
  using P = typename Op::Partial;
  using Shared = ColumnShared<Op, kThreads>;
  constexpr int N = Pack<typename Op::S>::N, U = Op::kUnroll, kWarps = Shared::kWarps;
  if (!Op::begins(args)) return;
  auto* shared = shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t tile = blockIdx.x % g.tiles, split = blockIdx.x / g.tiles;
  const int64_t first_column = tile * g.tile;
  const int columns = static_cast<int>(g.width - first_column < g.tile ? g.width - first_column : g.tile);
  const int64_t period = g.channels * g.inner;
  const int64_t first_channel = first_column / g.inner;
  const int channels = static_cast<int>((columns < period ? columns : period) / g.inner);
  const auto column = [&](int j) { return g.packs ? lane * N + j : lane + kWarp * j; };

  int64_t channel_of[N];
  for (int j = 0; j < N; ++j) {
    channel_of[j] = column(j) < columns ? (first_column + column(j)) % period / g.inner : 0;
  }
  Op op(args, channel_of);
  for (int64_t base = split * (kWarps * U) + warp; base < g.rows; base += g.splits * int64_t{kWarps * U}) {
    typename Op::Loaded loaded[U];
    unsigned whole = 0;  // a bit for each row that has all of this thread's columns side by side
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t row = base + u * kWarps;
      const int64_t i = row * g.width + first_column + lane * N;
      if (!g.packs || row >= g.rows || lane * N >= columns || i + N > g.numel) continue;
      whole |= 1u << u;
      loaded[u] = op.load(i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (whole >> u & 1u) op.fold(loaded[u], (base + u * kWarps) * g.width + first_column + lane * N);
    }
    if (whole == (1u << U) - 1) continue;
#pragma unroll 1
    for (int u = 0; u < U; ++u) {
      const int64_t row = base + u * kWarps;
      if ((whole >> u & 1u) || row >= g.rows) continue;
      const int64_t start = row * g.width + first_column;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (column(j) < columns && start + column(j) < g.numel) op.fold_one(start + column(j), j);
      }
    }
  }
  op.leave(args);

  // Over the warps, by halves; then over the columns of each channel.
  P mine[N];
#pragma unroll
  for (int j = 0; j < N; ++j) mine[j] = op.partial(j);
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int j = 0; j < N; ++j) shared->parts[(warp - half) * Shared::kTile + column(j)] = mine[j];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int j = 0; j < N; ++j) mine[j] = P::both(mine[j], shared->parts[warp * Shared::kTile + column(j)]);
    }
  }
  if (warp == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) shared->parts[column(j)] = mine[j];
  }
  __syncthreads();
  P p = P::nothing();
  if (thread < channels) {
    const int inner = static_cast<int>(g.inner);
    for (int64_t from = int64_t{thread} * inner; from < columns; from += period) {
      for (int k = 0; k < inner && from + k < columns; ++k) p = P::both(p, shared->parts[from + k]);
    }
  }
  if (g.splits == 1) {
    if (thread < channels) Op::finish(args, first_channel + thread, p);
    return;
  }

  // Over the splits: as many threads for each channel as there are.
  if (thread < channels) partials[split * g.channels + first_channel + thread] = p;
  if (!arrives_last(tickets + tile, g.splits, &shared->last)) return;
  int stride = 1;
  while (stride < channels) stride *= 2;
  const int mates = kThreads / stride, mate = thread / stride, own = thread % stride;
  p = P::nothing();
  if (own < channels) {
    for (int s = mate; s < g.splits; s += mates) {
      p = P::both(p, read_fresh(partials + s * g.channels + first_channel + own));
    }
  }
  shared->parts[thread] = p;
  for (int half = mates / 2; half > 0; half /= 2) {
    __syncthreads();
    if (mate < half) shared->parts[thread] = p = P::both(p, shared->parts[thread + half * stride]);
  }
  if (mate == 0 && own < channels) Op::finish(args, first_channel + own, p);
}

// Segments shorter than this are read as columns.
constexpr int64_t kShortSegment = 32;

template <class S>
ColumnGrid column_grid(const Dense& x, Alignment alignment) {
  constexpr int N = Pack<S>::N;
  constexpr int64_t kTile = kWarp * N;
  ColumnGrid g;
  g.numel = x.numel();
  g.inner = x.inner;
  g.channels = x.channels;
  const int64_t period = x.channels * x.inner;
  int64_t steps = 1;  // outer steps laid side by side
  if (period <= kTile) {
    steps = std::min(x.outer, kTile / period);
    if (steps >= N) steps -= steps % N;
    g.tile = static_cast<int>(steps * period);
  } else {
    g.tile = static_cast<int>(kTile - kTile % (x.inner * N));
  }
  g.width = steps * period;
  g.rows = (g.numel + g.width - 1) / g.width;
  g.tiles = (g.width + g.tile - 1) / g.tile;
  g.packs = alignment.alike && alignment.shift == 0 && g.width % N == 0;
  g.splits = 1;
  return g;
}

template <class Op, int kThreads>
void launch_columns(Launcher& launcher, const Dense& x, Alignment alignment, const typename Op::Args& args) {
  using P = typename Op::Partial;
  using Shared = ColumnShared<Op, kThreads>;
  constexpr int64_t kRound = int64_t{Shared::kWarps} * Op::kUnroll;  // rows that a block has in flight
  static_assert(Shared::kTile <= kThreads, "a thread for each channel of a tile");
  ColumnGrid g = column_grid<typename Op::S>(x, alignment);
  P* partials = nullptr;
  unsigned* tickets = nullptr;
  if (g.tiles <= kMaxTickets) {
    constexpr int64_t kThreadsWanted = 2048;  // of a multiprocessor
    const int64_t blocks = launcher.multiprocessors() * (kThreadsWanted / kThreads);
    const int64_t wanted = (blocks + g.tiles - 1) / g.tiles;
    g.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, (g.rows + kRound - 1) / kRound)));
  }
  if (g.splits > 1) {
    partials = static_cast<P*>(launcher.scratch(sizeof(P) * static_cast<size_t>(g.splits * g.channels)));
    tickets = launcher.tickets(g.tiles);
  }
  launch(launcher, reduce_columns<Op, kThreads>, g.tiles * g.splits, kThreads, sizeof(Shared), args, g,
         partials, tickets);
}

// ---------------------------------------------------------------------------------- both

inline bool has_long_segments(const Dense& x) { return x.outer == 1 || x.inner >= kShortSegment; }

// Op<S, kColumns> over all channels of x, which is not empty. Columns take blocks of so many
// threads: the fewer registers Op needs, the more.
template <template <class, int> class Op, class S, int kColumnThreads>
void reduce_channels(Launcher& launcher, const Dense& x, std::initializer_list<const void*> operands,
                     const typename Op<S, 1>::Args& args) {
  const Alignment alignment = alignment_of<S>(operands);
  if (has_long_segments(x)) {
    launch_rows<Op<S, 1>>(launcher, x, alignment, args);
  } else {
    launch_columns<Op<S, Pack<S>::N>, kColumnThreads>(launcher, x, alignment, args);
  }
}

}  // namespace
}  // namespace fastquant::cuda
