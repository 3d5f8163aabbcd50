// Per-channel reductions that read a tensor once, in one kernel launch, and per-channel work on each
// element. A channel's elements form contiguous segments: long segments are reduced by reduce_rows, short
// ones by reduce_columns.
//
// A class Op, derived from ChannelOp, defines the reduction. Each thread constructs one Op, which keeps the
// running results of kColumns channels in registers: one for reduce_rows, Pack::N for reduce_columns.
//
//   Args                  kernel parameter that is passed to Op's functions
//   S                     element type
//   Partial               result of reducing a part of a channel; device.cuh has its interface
//   kUnroll               how many loads a thread issues before it uses the first
//   Op(args, channels)    `channels` are the indices of the thread's channels
//   load(i)               starts loading the Pack::N elements from index i on; &x[i] is 16-byte aligned
//   fold(loaded, i)       reduces the loaded elements: all into the one channel, or element j into
//                         channel j
//   fold_one(i, column)   reduces element i into channel `column`
//   partial(column)       running result of channel `column`
//   leave(args)           called once by all lanes of each warp, after the last element
//   finish(args, channel, partial)   called by one thread for each channel, with the final result
//   static begins(args)   false if no element shall be read
//
// An Op may change these defaults of ChannelOp:
//
//   kReduces = false      elements are processed one by one: nothing is combined, and finish is never called
//   kConcludes = true     when all channels are finished, all threads of one block call conclude(args, shared),
//                         with shared memory of the Partials of a block's warps. They see what all finish
//                         calls have written. If begins(args) is false, one block calls it, and no block calls
//                         finish
#pragma once

#include "device.cuh"

namespace fastquant::cuda {
namespace {

struct ChannelOp {
  static constexpr bool kReduces = true;
  static constexpr bool kConcludes = false;
};

// `shift`: how many elements after a 16-byte boundary the first operand begins. `alike`: whether all
// operands have the same shift, so that elements of one index are aligned in all of them or in none.
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

// A channel consists of `outer` segments of `inner` contiguous elements. A slot is what one 16-byte
// access reads. Slots cover each segment; the first and last slot may extend beyond its ends.
struct RowGrid {
  int64_t channels, inner;
  int64_t slots;       // number of slots per channel
  Divider by_segment;  // divides by the number of slots per segment
  int shift;           // how many elements after a 16-byte boundary the tensor begins
  bool packs;          // slots are 16-byte aligned; if false, elements are read one at a time
  bool warps;          // each channel is reduced by one warp instead of by blocks
  int splits;          // number of blocks that share a channel
};

constexpr int kRowThreads = 256;

// A slot covers the part of [begin, begin + N) that is inside the segment, which starts at `segment`.
struct Slot {
  int64_t segment, begin;
};

template <int N>
__device__ Slot slot_at(const RowGrid& g, int64_t channel, int64_t index) {
  // Most channels have only one segment; then the division is skipped.
  const int64_t row = g.slots == g.by_segment.divisor() ? 0 : g.by_segment.quotient(index);
  const int64_t segment = (row * g.channels + channel) * g.inner;
  const int64_t before = g.packs ? (segment + g.shift) & (N - 1) : 0;
  return {segment, segment - before + (index - row * g.by_segment.divisor()) * N};
}

// Reduces every `rounds`-th round of a channel, from `first_round` on. In one round, each of the `lanes`
// threads reads kUnroll slots.
template <class Op>
__device__ void fold_rows(Op* op, const RowGrid& g, int64_t channel, int64_t first_round, int64_t rounds,
                          int lane, int lanes) {
  constexpr int N = Pack<typename Op::S>::N, U = Op::kUnroll;
  for (int64_t base = first_round * lanes * U; base < g.slots; base += rounds * lanes * U) {
    typename Op::Loaded loaded[U];
    int64_t begin[U];
    unsigned whole = 0;  // bit u is set if slot u is entirely in its segment, so that one access reads it
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

// The part of a block in reduce_rows, up to finishing its channels.
template <class Op>
__device__ void reduce_rows_of_block(const typename Op::Args& args, const RowGrid& g,
                                     typename Op::Partial* partials, unsigned* tickets,
                                     RowShared<typename Op::Partial>* shared) {
  using P = typename Op::Partial;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (g.warps) {
    const int64_t channel = int64_t{block} * (kRowThreads / kWarp) + thread / kWarp;
    if (channel >= g.channels) return;
    Op op(args, {channel});
    fold_rows(&op, g, channel, 0, 1, thread % kWarp, kWarp);
    op.leave(args);
    if constexpr (Op::kReduces) {
      const P p = over_warp(op.partial(0));
      if (thread % kWarp == 0) Op::finish(args, channel, p);
    }
    return;
  }
  const int64_t channel = block / g.splits;
  const int split = block % g.splits;
  Op op(args, {channel});
  fold_rows(&op, g, channel, split, g.splits, thread, kRowThreads);
  op.leave(args);
  if constexpr (Op::kReduces) {
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
}

// What the kernels below do before and after reading x. `final_ticket` is the ticket of the whole grid.
template <class Op, class F>
__device__ void reduce_and_conclude(const typename Op::Args& args, unsigned* final_ticket, bool* last,
                                    typename Op::Partial* shared, const F& reduce_block) {
  if constexpr (Op::kConcludes) {
    const bool begins = Op::begins(args);
    if (begins) reduce_block();
    if (begins ? arrives_last(final_ticket, gridDim.x, last) : blockIdx.x == 0) Op::conclude(args, shared);
  } else {
    if (Op::begins(args)) reduce_block();
  }
}

template <class Op>
__global__ void __launch_bounds__(kRowThreads)
    reduce_rows(const __grid_constant__ typename Op::Args args, const __grid_constant__ RowGrid g,
                typename Op::Partial* partials, unsigned* tickets, unsigned* final_ticket) {
  auto* shared = shared_memory<RowShared<typename Op::Partial>>();
  reduce_and_conclude<Op>(args, final_ticket, &shared->last, shared->warps,
                          [&] { reduce_rows_of_block<Op>(args, g, partials, tickets, shared); });
}

template <class S>
RowGrid row_grid(const Dense& x, Alignment alignment) {
  constexpr int N = Pack<S>::N;
  RowGrid g;
  g.channels = x.channels;
  g.inner = x.inner;
  g.packs = alignment.alike;
  g.shift = alignment.shift;
  // A segment that does not begin on a 16-byte boundary may need one more slot.
  const bool aligned = !g.packs || (g.shift == 0 && (x.inner % N == 0 || x.outer * x.channels == 1));
  const int64_t segment = (x.inner + N - 1) / N + (aligned ? 0 : 1);
  g.slots = x.outer * segment;
  g.by_segment = Divider(segment);
  g.warps = false;
  g.splits = 1;
  return g;
}

// The global memory through which blocks share work.
template <class P>
struct SharedWork {
  P* partials = nullptr;
  unsigned *tickets = nullptr, *final_ticket = nullptr;
};

// Whether several blocks may share each of `count` channels or tiles: there is a ticket for each.
template <class Op>
bool may_split(int64_t count) {
  return !Op::kReduces || count < kMaxTickets;
}

// `split`: how many channels or tiles are shared by several blocks; `parts`: how many partial results these
// leave.
template <class Op>
SharedWork<typename Op::Partial> shared_work(Launcher& launcher, int64_t split, int64_t parts) {
  using P = typename Op::Partial;
  SharedWork<P> work;
  if (!Op::kReduces) split = 0;
  if (split > 0) work.partials = static_cast<P*>(launcher.scratch(sizeof(P) * static_cast<size_t>(parts)));
  if (split > 0 || Op::kConcludes) work.tickets = launcher.tickets(split + (Op::kConcludes ? 1 : 0));
  if (Op::kConcludes) work.final_ticket = work.tickets + split;
  return work;
}

template <class Op>
void launch_rows(Launcher& launcher, const Dense& x, Alignment alignment, const typename Op::Args& args) {
  using P = typename Op::Partial;
  constexpr int kBlocksWanted = 4;                                // per multiprocessor
  constexpr int64_t kRound = int64_t{kRowThreads} * Op::kUnroll;  // slots that a block reads at a time
  RowGrid g = row_grid<typename Op::S>(x, alignment);
  g.warps = x.channels > 1 && g.slots <= kRound / 4;
  int64_t blocks = x.channels;
  if (g.warps) {
    blocks = (x.channels + kRowThreads / kWarp - 1) / (kRowThreads / kWarp);
  } else if (may_split<Op>(x.channels)) {
    const int64_t wanted = (launcher.multiprocessors() * int64_t{kBlocksWanted} + x.channels - 1) / x.channels;
    g.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, (g.slots + kRound - 1) / kRound)));
    blocks = x.channels * g.splits;
  }
  const auto [partials, tickets, final_ticket] =
      shared_work<Op>(launcher, g.splits > 1 ? x.channels : 0, blocks);
  launch(launcher, reduce_rows<Op>, blocks, kRowThreads, sizeof(RowShared<P>), args, g, partials, tickets,
         final_ticket);
}

// Launches only Op::conclude, for tensors without elements.
template <class Op>
__global__ void __launch_bounds__(kRowThreads) conclude_alone(const __grid_constant__ typename Op::Args args) {
  Op::conclude(args, shared_memory<typename Op::Partial>());
}

template <class Op>
void launch_conclusion(Launcher& launcher, const typename Op::Args& args) {
  constexpr size_t kShared = sizeof(typename Op::Partial) * (kRowThreads / kWarp);
  launch(launcher, conclude_alone<Op>, 1, kRowThreads, kShared, args);
}

// ------------------------------------------------------------------------------- columns

// The tensor's memory as a matrix with `width` columns whose last row may be incomplete. All elements of
// a column belong to one channel. A thread reduces Pack::N columns, row after row. A tile is the set of
// columns that one block reduces; no two tiles have columns of the same channel.
struct ColumnGrid {
  int64_t numel;
  int64_t rows, width;
  int64_t inner, channels;
  int64_t tiles;
  int tile;    // columns per tile; the last tile may have fewer
  int splits;  // number of blocks that share a tile, each reducing some of the rows
  bool packs;  // a thread's columns are adjacent and 16-byte aligned; if false, they are kWarp apart
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

// The columns that a block reduces, and the channels that they belong to.
struct ColumnTile {
  __device__ ColumnTile(const ColumnGrid& g, int64_t index)
      : first_column(index * g.tile),
        columns(static_cast<int>(g.width - first_column < g.tile ? g.width - first_column : g.tile)),
        period(g.channels * g.inner),
        first_channel(first_column / g.inner),
        channels(static_cast<int>((columns < period ? columns : period) / g.inner)) {}

  int64_t first_column;
  int columns;
  int64_t period;  // columns that are so many apart belong to the same channel
  int64_t first_channel;
  int channels;
};

// The j-th column of a thread in its block's tile.
template <class S>
__device__ int column_of_thread(const ColumnGrid& g, int j) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return g.packs ? lane * Pack<S>::N + j : lane + kWarp * j;
}

// Reduces every `splits`-th round of rows of a tile, from round `split` on.
template <class Op, int kThreads>
__device__ void fold_columns(Op* op, const ColumnGrid& g, const ColumnTile& tile, int64_t split) {
  constexpr int N = Pack<typename Op::S>::N, U = Op::kUnroll, kWarps = kThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t base = split * (kWarps * U) + warp; base < g.rows; base += g.splits * int64_t{kWarps * U}) {
    typename Op::Loaded loaded[U];
    unsigned whole = 0;  // bit u is set if one access reads all of this thread's columns of row u
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t row = base + u * kWarps;
      const int64_t i = row * g.width + tile.first_column + lane * N;
      if (!g.packs || row >= g.rows || lane * N >= tile.columns || i + N > g.numel) continue;
      whole |= 1u << u;
      loaded[u] = op->load(i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (whole >> u & 1u) op->fold(loaded[u], (base + u * kWarps) * g.width + tile.first_column + lane * N);
    }
    if (whole == (1u << U) - 1) continue;
#pragma unroll 1
    for (int u = 0; u < U; ++u) {
      const int64_t row = base + u * kWarps;
      if ((whole >> u & 1u) || row >= g.rows) continue;
      const int64_t start = row * g.width + tile.first_column;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int column = column_of_thread<typename Op::S>(g, j);
        if (column < tile.columns && start + column < g.numel) op->fold_one(start + column, j);
      }
    }
  }
}

// Combines what the threads of a block have folded, and finishes channels for which that is all, or for
// which the other blocks of the tile have already done their part.
template <class Op, int kThreads>
__device__ void combine_columns(const typename Op::Args& args, const Op& op, const ColumnGrid& g,
                                const ColumnTile& tile, int64_t split, typename Op::Partial* partials,
                                unsigned* ticket, ColumnShared<Op, kThreads>* shared) {
  using P = typename Op::Partial;
  using S = typename Op::S;
  using Shared = ColumnShared<Op, kThreads>;
  constexpr int N = Pack<S>::N;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  // First the warps in a tree, then the columns of each channel.
  P mine[N];
#pragma unroll
  for (int j = 0; j < N; ++j) mine[j] = op.partial(j);
  for (int half = Shared::kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        shared->parts[(warp - half) * Shared::kTile + column_of_thread<S>(g, j)] = mine[j];
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        mine[j] = P::both(mine[j], shared->parts[warp * Shared::kTile + column_of_thread<S>(g, j)]);
      }
    }
  }
  if (warp == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) shared->parts[column_of_thread<S>(g, j)] = mine[j];
  }
  __syncthreads();
  P p = P::nothing();
  if (thread < tile.channels) {
    const int inner = static_cast<int>(g.inner);
    for (int64_t from = int64_t{thread} * inner; from < tile.columns; from += tile.period) {
      for (int k = 0; k < inner && from + k < tile.columns; ++k) p = P::both(p, shared->parts[from + k]);
    }
  }
  if (g.splits == 1) {
    if (thread < tile.channels) Op::finish(args, tile.first_channel + thread, p);
    return;
  }

  // The block that finishes last combines the results of all blocks of the tile. kThreads / stride
  // threads share each channel.
  if (thread < tile.channels) partials[split * g.channels + tile.first_channel + thread] = p;
  if (!arrives_last(ticket, g.splits, &shared->last)) return;
  int stride = 1;
  while (stride < tile.channels) stride *= 2;
  const int mates = kThreads / stride, mate = thread / stride, own = thread % stride;
  p = P::nothing();
  if (own < tile.channels) {
    for (int s = mate; s < g.splits; s += mates) {
      p = P::both(p, read_fresh(partials + s * g.channels + tile.first_channel + own));
    }
  }
  shared->parts[thread] = p;
  for (int half = mates / 2; half > 0; half /= 2) {
    __syncthreads();
    if (mate < half) shared->parts[thread] = p = P::both(p, shared->parts[thread + half * stride]);
  }
  if (mate == 0 && own < tile.channels) Op::finish(args, tile.first_channel + own, p);
}

// Registers are limited so that 512 threads fit on a multiprocessor; with fewer, too few loads are under way.
template <class Op, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads < 512 ? 512 / kThreads : 1)
    reduce_columns(const __grid_constant__ typename Op::Args args, const __grid_constant__ ColumnGrid g,
                   typename Op::Partial* partials, unsigned* tickets, unsigned* final_ticket) {
  constexpr int N = Pack<typename Op::S>::N;
  auto* shared = shared_memory<ColumnShared<Op, kThreads>>();
  reduce_and_conclude<Op>(args, final_ticket, &shared->last, shared->parts, [&] {
    const int64_t index = blockIdx.x % g.tiles, split = blockIdx.x / g.tiles;
    const ColumnTile tile(g, index);
    int64_t channel_of[N];
    for (int j = 0; j < N; ++j) {
      const int column = column_of_thread<typename Op::S>(g, j);
      channel_of[j] = column < tile.columns ? (tile.first_column + column) % tile.period / g.inner : 0;
    }
    Op op(args, channel_of);
    fold_columns<Op, kThreads>(&op, g, tile, split);
    op.leave(args);
    if constexpr (Op::kReduces) {
      combine_columns<Op, kThreads>(args, op, g, tile, split, partials, tickets + index, shared);
    }
  });
}

// Channels with several segments shorter than this are reduced by reduce_columns.
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
  int64_t steps = 1;  // how many indices of the outer dimension form one row
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
  using Shared = ColumnShared<Op, kThreads>;
  constexpr int64_t kRound = int64_t{Shared::kWarps} * Op::kUnroll;  // rows that a block reads at a time
  static_assert(Shared::kTile <= kThreads, "a thread for each channel of a tile");
  ColumnGrid g = column_grid<typename Op::S>(x, alignment);
  if (may_split<Op>(g.tiles)) {
    constexpr int64_t kThreadsWanted = 2048;  // per multiprocessor
    const int64_t blocks = launcher.multiprocessors() * (kThreadsWanted / kThreads);
    const int64_t wanted = (blocks + g.tiles - 1) / g.tiles;
    g.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, (g.rows + kRound - 1) / kRound)));
  }
  const auto [partials, tickets, final_ticket] =
      shared_work<Op>(launcher, g.splits > 1 ? g.tiles : 0, g.splits * g.channels);
  launch(launcher, reduce_columns<Op, kThreads>, g.tiles * g.splits, kThreads, sizeof(Shared), args, g,
         partials, tickets, final_ticket);
}

// ------------------------------------------------------------------------------ dispatch

inline bool has_long_segments(const Dense& x) { return x.outer == 1 || x.inner >= kShortSegment; }

// Reduces every channel of x, which must not be empty, with Op<S, kColumns>. kColumnThreads is the block
// size of reduce_columns; it is limited by the number of registers that Op needs.
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
