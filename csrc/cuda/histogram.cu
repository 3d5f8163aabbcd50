// Observing a histogram, and the search for the range with the smallest quantization error.
//
// A large tensor takes two launches. The first, find_range, computes the tensor's range. In the same pass
// it counts elements in the bins of the histogram's present range, since most tensors do not extend that
// range; its last block finds out whether this one does. The second, count_range, then adds up these
// counts. If the range was extended, it counts again in the new bins instead, while some of its blocks
// resample the old counts to the new bins. For a small tensor, one block does everything in one launch.
#include "../math/search.h"
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // shared memory that a block may use on every device

// How a tensor's range changes the histogram. The truth values are as wide as the rest: count_range loads whole
// words, and padding, which find_range would not store, would be uninitialized memory.
struct Plan {
  int64_t counts;      // the tensor has elements to count
  int64_t starts;      // the histogram was empty
  int64_t moves;       // the range changes, so the old counts have to be resampled
  HistogramRange old;  // the range of the bins before this tensor
  HistogramRange now;  // the range of the bins after it
};
static_assert(sizeof(Plan) == 3 * sizeof(int64_t) + 2 * sizeof(HistogramRange), "no padding");

struct HistogramArgs {
  MinMaxArgs minmax;
  int64_t numel;
  int shift;  // how many elements after a 16-byte boundary the tensor begins
  Buffer histogram, min_val, max_val;
  double most;  // largest finite value of min_val's type; finite elements beyond it are clamped to it
  int64_t bins, rate;
  int64_t times;  // how often the counts are added to the histogram
  // Each block counts in several copies of the histogram in shared memory, so that atomics on one bin
  // contend less. 0 copies if not even one fits into shared memory.
  int copies, copy_stride;
  bool guesses;  // find_range counts in the bins of the present range
  int64_t counting_blocks;
  // Written by find_range for count_range: the plan and, for each block, its range (Extremes<T>, with T
  // depending on the element type) and, if `guesses`, its counts.
  Plan* plan;
  void* block_ranges;
  unsigned* block_counts;
  // Used by count_range if it counts itself: total counts, which find_range sets to zero, and the resampled
  // old counts.
  unsigned long long* counts;
  double* moved;
  unsigned* ticket;
};

// -------------------------------------------------------------------- visiting elements

// Visits this thread's elements out of `threads` threads: calls on_pack for aligned groups of 16 bytes, and
// on_one for the single elements before the first and after the last group.
template <class S, class OnPack, class OnOne>
__device__ void walk(const HistogramArgs& a, int64_t thread, int64_t threads, const OnPack& on_pack,
                     const OnOne& on_one) {
  using Loaded = Pack<S>;
  constexpr int N = Loaded::N, U = 4;
  const S* x = static_cast<const S*>(a.minmax.x);
  const int64_t before = (N - a.shift) % N, head = before < a.numel ? before : a.numel;
  const int64_t packs = (a.numel - head) / N;
  const Loaded* from = reinterpret_cast<const Loaded*>(x + head);
  for (int64_t base = thread; base < packs; base += threads * U) {
    Loaded loaded[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + u * threads < packs) loaded[u] = load_whole<Loaded>(from + base + u * threads);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (base + u * threads < packs) on_pack(loaded[u]);
    }
  }
  const int64_t rest = head + packs * N;
  if (thread < head) on_one(x[thread]);
  if (rest + thread < a.numel) on_one(x[rest + thread]);
}

// ------------------------------------------------------------------------------ counting

// The value of an element, clamped to the finite values that min_val and max_val can represent.
template <class S>
__device__ Compute<S> held(const HistogramArgs& a, S element) {
  const Compute<S> value = to_compute(element);
  return sizeof(S) == sizeof(double) ? kept_finite(value, a.most) : value;
}

// Calls add(bin) for each element in the range. Only for ranges where BinFormula is exact enough
// (bin_formula_fits).
template <class S, class Add>
class Counter {
 public:
  using T = Compute<S>;

  __device__ Counter(const HistogramArgs& a, const HistogramRange& range, const Add& add)
      : args_(a),
        formula_(BinFormula<Cuda<T>>::of(static_cast<T>(range.low), static_cast<T>(range.high), a.bins)),
        add_(add) {}

  __device__ void operator()(S element) const {
    const T value = held(args_, element);
    if (formula_.inside(value)) add_(static_cast<int32_t>(formula_.bin(value)));
  }

  __device__ void operator()(const Pack<S>& pack) const {
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) (*this)(pack.at(j));
  }

 private:
  const HistogramArgs& args_;
  BinFormula<Cuda<T>> formula_;
  const Add& add_;
};

template <class S, class Add>
__device__ void count_elements(const HistogramArgs& a, const HistogramRange& range, int64_t thread,
                               int64_t threads, const Add& add) {
  if (bin_formula_fits<Compute<S>>(range, a.bins)) {
    const Counter<S, Add> counter(a, range, add);
    walk<S>(a, thread, threads, counter, counter);
    return;
  }
  const S* x = static_cast<const S*>(a.minmax.x);
  for (int64_t i = thread; i < a.numel; i += threads) {
    const int64_t bin = wide_bin(static_cast<double>(held(a, x[i])), range, a.bins);
    if (bin >= 0) add(static_cast<int32_t>(bin));
  }
}

// The copies of the histogram that a block counts in.
class Tables {
 public:
  __device__ Tables(const HistogramArgs& a, unsigned* memory) : a_(a), memory_(memory) {}

  __device__ void clear() const {
    for (int i = static_cast<int>(threadIdx.x); i < a_.copies * a_.copy_stride; i += kThreads) memory_[i] = 0;
  }

  // The copy that this thread counts in.
  __device__ unsigned* own() const {
    return memory_ + static_cast<int>(threadIdx.x) % a_.copies * a_.copy_stride;
  }

  __device__ unsigned count(int64_t bin) const {
    unsigned total = 0;
    for (int c = 0; c < a_.copies; ++c) total += memory_[c * a_.copy_stride + bin];
    return total;
  }

 private:
  const HistogramArgs& a_;
  unsigned* memory_;
};

// ------------------------------------------------------------------------------ deciding

template <class T>
__device__ Plan plan_for(const HistogramArgs& a, const Extremes<T>& seen) {
  Plan plan;
  plan.old = {read<double>(a.min_val), read<double>(a.max_val)};
  plan.starts = is_unused(plan.old);
  plan.now = widened(plan.old, {kept_finite(static_cast<double>(seen.low), a.most),
                                kept_finite(static_cast<double>(seen.high), a.most)});
  plan.counts = !(seen.low > seen.high) && plan.now.low <= plan.now.high;  // false if the range is NaN
  plan.moves = !plan.starts && (plan.now.low != plan.old.low || plan.now.high != plan.old.high);
  return plan;
}

template <class T>
__device__ void write_range(const HistogramArgs& a, const Extremes<T>& seen, const Plan& plan) {
  if (seen.low > seen.high) return;
  write(a.min_val, 0, plan.now.low);
  write(a.max_val, 0, plan.now.high);
}

// The count that a bin of the new range gets when the old counts are resampled.
__device__ __noinline__ double moved_count(const HistogramArgs& a, const Plan& plan, int64_t bin) {
  const auto old = [&](int64_t b) { return read<double>(a.histogram, b); };
  if (plan.old.low == plan.old.high) {
    double total = 0;
    if (bin_of_point(plan.old.low, plan.now, a.bins) != bin) return total;
    for (int64_t b = 0; b < a.bins; ++b) total += old(b);
    return total;
  }
  const auto resampled = [&](const auto& resampling) {
    return resampling.sum(resampling.parts_before(bin), resampling.parts_before(bin + 1), old);
  };
  if (resamples_in_double(a.histogram.type == Element::f64, plan.now, a.bins)) {
    return resampled(Resampling<double>(plan.old, plan.now, a.bins, a.rate));
  }
  return resampled(Resampling<float>(plan.old, plan.now, a.bins, a.rate));
}

__device__ inline void write_bin(const HistogramArgs& a, const Plan& plan, int64_t bin, double moved,
                                 unsigned long long count) {
  double sum = plan.starts ? 0.0 : (plan.moves ? moved : read<double>(a.histogram, bin));
  for (int64_t t = 0; t < a.times; ++t) {
    sum += static_cast<double>(count);
    if (a.histogram.type == Element::f32) sum = static_cast<double>(static_cast<float>(sum));
  }
  write(a.histogram, bin, sum);
}

// -------------------------------------------------------------------------- large tensors

template <class P>
struct LargeShared {
  P warps[kThreads / kWarp];
  bool last;
};

template <class S>
__global__ void __launch_bounds__(kThreads) find_range(const __grid_constant__ HistogramArgs a) {
  using Op = MinMax<S, 1>;
  using P = typename Op::Partial;
  auto* shared = shared_memory<LargeShared<P>>();
  const Tables tables(a, reinterpret_cast<unsigned*>(shared + 1));
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, threads = a.counting_blocks * kThreads;
  const int64_t first = block * kThreads + thread;
  for (int64_t b = first; b < a.bins; b += threads) a.counts[b] = 0;
  const HistogramRange old = {read<double>(a.min_val), read<double>(a.max_val)};
  const HistogramRange range = counting_range<typename Op::T>(old);
  const bool guesses = a.guesses && !is_unused(old) && bin_formula_fits<typename Op::T>(range, a.bins);

  Op op(a.minmax, {0});
  if (guesses) {
    tables.clear();
    __syncthreads();
    unsigned* own = tables.own();
    const auto add = [&](int32_t bin) { atomicAdd(own + bin, 1u); };
    const Counter<S, decltype(add)> counter(a, range, add);
    walk<S>(
        a, first, threads,
        [&](const Pack<S>& pack) {
          op.fold(pack, 0);
          counter(pack);
        },
        [&](S element) {
          op.take_any(to_compute(element), 0);
          counter(element);
        });
  } else {
    walk<S>(
        a, first, threads, [&](const Pack<S>& pack) { op.fold(pack, 0); },
        [&](S element) { op.take_any(to_compute(element), 0); });
  }
  op.leave(a.minmax);

  P* ranges = static_cast<P*>(a.block_ranges);
  P p = over_block(op.partial(0), shared->warps);
  if (thread == 0) ranges[block] = p;
  if (guesses) {
    for (int64_t bin = thread; bin < a.bins; bin += kThreads) {
      a.block_counts[block * a.bins + bin] = tables.count(bin);
    }
  }
  if (!arrives_last(a.ticket, a.counting_blocks, &shared->last)) return;
  p = P::nothing();
  for (int64_t b = thread; b < a.counting_blocks; b += kThreads) p = P::both(p, read_fresh(ranges + b));
  p = over_block(p, shared->warps);
  if (thread == 0) {
    const Plan plan = plan_for(a, p);
    write_range(a, p, plan);
    *a.plan = plan;
  }
}

// Adds up the counts of all blocks of find_range, 32 bins at a time. Each lane sums one bin, and each warp
// sums over some of the blocks.
__device__ inline void add_up_guess(const HistogramArgs& a, const Plan& plan, unsigned long long* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < a.bins; first += int64_t{gridDim.x} * kWarp) {
    const int64_t bin = first + lane;
    unsigned long long total = 0;
    for (int64_t b = warp; bin < a.bins && b < a.counting_blocks; b += kThreads / kWarp) {
      total += a.block_counts[b * a.bins + bin];
    }
    shared[warp * kWarp + lane] = total;
    __syncthreads();
    if (warp == 0 && bin < a.bins) {
      total = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) total += shared[w * kWarp + lane];
      write_bin(a, plan, bin, 0.0, total);
    }
    __syncthreads();
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) count_range(const __grid_constant__ HistogramArgs a) {
  using T = Compute<S>;
  auto* memory = shared_memory<unsigned long long>();
  const Plan plan = *a.plan;
  if (!plan.counts) return;
  if (a.guesses && !plan.starts && !plan.moves && bin_formula_fits<T>(counting_range<T>(plan.now), a.bins)) {
    add_up_guess(a, plan, memory);
    return;
  }

  bool* last = reinterpret_cast<bool*>(memory);
  const Tables tables(a, reinterpret_cast<unsigned*>(memory + 1));
  const HistogramRange range = counting_range<T>(plan.now);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, threads = a.counting_blocks * kThreads;
  if (block >= a.counting_blocks) {
    const int64_t bin = (block - a.counting_blocks) * kThreads + thread;
    if (plan.moves && bin < a.bins) a.moved[bin] = moved_count(a, plan, bin);
  } else if (a.copies == 0) {
    count_elements<S>(a, range, block * kThreads + thread, threads,
                      [&](int32_t bin) { atomicAdd(a.counts + bin, 1ull); });
  } else {
    tables.clear();
    __syncthreads();
    unsigned* own = tables.own();
    count_elements<S>(a, range, block * kThreads + thread, threads,
                      [&](int32_t bin) { atomicAdd(own + bin, 1u); });
    __syncthreads();
    for (int64_t bin = thread; bin < a.bins; bin += kThreads) {
      const unsigned count = tables.count(bin);
      if (count > 0) atomicAdd(a.counts + bin, static_cast<unsigned long long>(count));
    }
  }
  if (!arrives_last(a.ticket, gridDim.x, last)) return;
  for (int64_t bin = thread; bin < a.bins; bin += kThreads) {
    write_bin(a, plan, bin, plan.moves ? read_fresh(a.moved + bin) : 0.0, read_fresh(a.counts + bin));
  }
}

// -------------------------------------------------------------------------- small tensors

template <class P>
struct SmallShared {
  P warps[kThreads / kWarp];
  Plan plan;
};

template <class S>
__global__ void __launch_bounds__(kThreads) observe_small(const __grid_constant__ HistogramArgs a) {
  using Op = MinMax<S, 1>;
  using P = typename Op::Partial;
  auto* shared = shared_memory<SmallShared<P>>();
  const Tables tables(a, reinterpret_cast<unsigned*>(shared + 1));
  const int thread = static_cast<int>(threadIdx.x);
  tables.clear();
  Op op(a.minmax, {0});
  walk<S>(
      a, thread, kThreads, [&](const Pack<S>& pack) { op.fold(pack, 0); },
      [&](S element) { op.take_any(to_compute(element), 0); });
  op.leave(a.minmax);
  const P p = over_block(op.partial(0), shared->warps);
  if (thread == 0) {
    shared->plan = plan_for(a, p);
    write_range(a, p, shared->plan);
  }
  __syncthreads();
  const Plan plan = shared->plan;
  if (!plan.counts) return;
  if (plan.moves) {
    for (int64_t bin = thread; bin < a.bins; bin += kThreads) a.moved[bin] = moved_count(a, plan, bin);
  }
  unsigned* own = tables.own();
  count_elements<S>(a, counting_range<typename Op::T>(plan.now), thread, kThreads,
                    [&](int32_t bin) { atomicAdd(own + bin, 1u); });
  __syncthreads();
  for (int64_t bin = thread; bin < a.bins; bin += kThreads) {
    write_bin(a, plan, bin, plan.moves ? a.moved[bin] : 0.0, tables.count(bin));
  }
}

// ------------------------------------------------------------------------------- launches

// Chooses how many copies of the histogram a block counts in: at most four, as many as fit into shared
// memory. The stride makes each copy begin in a different bank.
void choose_copies(HistogramArgs* a, size_t other_bytes) {
  a->copies = 0;
  a->copy_stride = 0;
  for (int copies : {4, 2, 1}) {
    const int64_t stride = (a->bins + kWarp - 1) / kWarp * kWarp + kWarp / copies;
    if (static_cast<size_t>(copies * stride) * sizeof(unsigned) + other_bytes > kSharedBytes) continue;
    a->copies = copies;
    a->copy_stride = static_cast<int>(stride);
    return;
  }
}

size_t table_bytes(const HistogramArgs& a) {
  return static_cast<size_t>(a.copies) * static_cast<size_t>(a.copy_stride) * sizeof(unsigned);
}

template <class S>
void observe_histogram_of(Launcher& launcher, HistogramArgs a) {
  using P = typename MinMax<S, 1>::Partial;
  constexpr int64_t kSmallBytes = 64 * 1024;
  const size_t bins = static_cast<size_t>(a.bins);
  a.shift = alignment_of<S>({a.minmax.x}).shift;
  choose_copies(&a, std::max(sizeof(SmallShared<P>), sizeof(LargeShared<P>)));
  if (a.copies > 0 && a.numel * static_cast<int64_t>(sizeof(S)) <= kSmallBytes) {
    a.moved = static_cast<double*>(launcher.scratch(bins * sizeof(double)));
    launch(launcher, observe_small<S>, 1, kThreads, sizeof(SmallShared<P>) + table_bytes(a), a);
    return;
  }

  constexpr int64_t kBlocksWanted = 2;                // per multiprocessor
  constexpr int64_t kRound = int64_t{kThreads} * 4;   // 16-byte loads that a block issues at a time
  constexpr int64_t kMostOfBlock = int64_t{1} << 31;  // elements per block, so that no 32-bit count overflows
  constexpr int64_t kMostGuessedBins = 4096;          // limits the memory for the counts of every block
  const int64_t rounds = a.numel / (kRound * Pack<S>::N) + 1;
  a.counting_blocks = std::max(std::min(launcher.multiprocessors() * kBlocksWanted, rounds),
                               (a.numel + kMostOfBlock - 1) / kMostOfBlock);
  a.guesses = a.copies > 0 && a.bins <= kMostGuessedBins;
  const size_t blocks = static_cast<size_t>(a.counting_blocks);
  a.plan = static_cast<Plan*>(launcher.scratch(sizeof(Plan)));
  a.block_ranges = launcher.scratch(blocks * sizeof(P));
  a.counts = static_cast<unsigned long long*>(launcher.scratch(bins * sizeof(unsigned long long)));
  a.moved = static_cast<double*>(launcher.scratch(bins * sizeof(double)));
  if (a.guesses) {
    a.block_counts = static_cast<unsigned*>(launcher.scratch(blocks * bins * sizeof(unsigned)));
  }
  a.ticket = launcher.tickets(1);
  launch(launcher, find_range<S>, a.counting_blocks, kThreads, sizeof(LargeShared<P>) + table_bytes(a), a);
  a.ticket = launcher.tickets(1);
  launch(launcher, count_range<S>, a.counting_blocks + (a.bins + kThreads - 1) / kThreads, kThreads,
         std::max(kThreads * sizeof(unsigned long long), sizeof(unsigned long long) + table_bytes(a)), a);
}

// --------------------------------------------------------------------------------- search

struct SearchArgs {
  Buffer histogram, min_val, max_val, new_min, new_max;
  int64_t bins;
  double levels;
  float *counts, *cumulative, *errors;
};

struct SearchShared {
  float chains[kSumChains];
  float total;
  double lanes[kErrorLanes];
  int64_t start, end;
  bool goes_on;
};

template <class B>
__global__ void __launch_bounds__(kThreads) search_range(const __grid_constant__ SearchArgs a) {
  auto* shared = shared_memory<SearchShared>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t b = thread; b < a.bins; b += kThreads) a.counts[b] = read<float>(a.histogram, b);
  __syncthreads();
  if (thread < kSumChains) sum_chains<1>(a.counts, a.bins, thread, &shared->chains[thread]);
  __syncthreads();
  if (thread == 0) {
    double running = 0;
    for (int64_t b = 0; b < a.bins; ++b) {
      running += static_cast<double>(a.counts[b]);
      a.cumulative[b] = static_cast<float>(running);
    }
    shared->total = sum_of_chains(shared->chains, a.counts, a.bins);
  }
  __syncthreads();
  const HistogramRange range = {read<double>(a.min_val), read<double>(a.max_val)};
  const double width = width_for_search(range, a.bins);
  for (int64_t b = thread; b < a.bins; b += kThreads)
    a.counts[b] /= static_cast<float>(width);           // from here on, counts holds densities
  RangeWalk walk(a.cumulative, shared->total, a.bins);  // only thread 0 uses it
  const auto announce = [&](bool goes_on) {
    shared->goes_on = goes_on;
    shared->start = walk.next_start();
    shared->end = walk.next_end();
  };
  if (thread == 0) announce(walk.next());
  __syncthreads();
  while (shared->goes_on) {
    const double dst_width = width * static_cast<double>(shared->end - shared->start + 1) / a.levels;
    const auto error = BinError<Cuda<float>>::of(width, dst_width, a.levels);
    for (int64_t b = thread; b < a.bins; b += kThreads) {
      a.errors[b] = error(static_cast<float>(b - shared->start), a.counts[b]);
    }
    __syncthreads();
    const int64_t whole = a.bins - a.bins % kErrorLanes;
    if (thread < kErrorLanes) {
      double sum = 0;
      for (int64_t b = thread; b < whole; b += kErrorLanes) sum += static_cast<double>(a.errors[b]);
      shared->lanes[thread] = sum;
    }
    __syncthreads();
    if (thread == 0) {
      double total = 0;
      for (double lane : shared->lanes) total += lane;
      for (int64_t b = whole; b < a.bins; ++b) total += static_cast<double>(a.errors[b]);
      announce(walk.take(dst_width == 0 ? 0.0 : total) && walk.next());
    }
    __syncthreads();
  }
  if (thread == 0) {
    const auto found = range_of_bins<B>(range, a.bins, walk.start(), walk.end());
    write(a.new_min, 0, found.low);
    write(a.new_max, 0, found.high);
  }
}

}  // namespace

void observe_histogram(Launcher& launcher, const Dense& x, const Array& histogram,
                       const ObserveBuffers& buffers, int64_t upsample_rate, NonFinite policy, int64_t times) {
  check_count(buffers.min_val, 1);
  check_count(buffers.max_val, 1);
  check(histogram.numel > 0 && histogram.numel <= INT_MAX && upsample_rate > 0, "a histogram needs bins");
  check(times > 0, "times must be positive, and is ", times);
  for (const Array* buffer : {&histogram, &buffers.min_val, &buffers.max_val}) {
    // In narrower types, adding 1 to a count soon has no effect: from 256 on in bfloat16.
    check(buffer->type == Element::f32 || buffer->type == Element::f64, buffer->name,
          " must be float32 or float64");
  }
  if (x.numel() == 0) return;
  if (policy == NonFinite::raise) refuse_nonfinite(launcher, x, Flag());
  HistogramArgs a = {};
  a.minmax.x = x.data;
  a.minmax.keeps_nan = policy == NonFinite::propagate;
  if (policy == NonFinite::ignore) a.minmax.left_out = static_cast<int64_t*>(buffers.nonfinite_count.data);
  a.numel = x.numel();
  a.histogram = Buffer(histogram);
  a.min_val = Buffer(buffers.min_val);
  a.max_val = Buffer(buffers.max_val);
  a.bins = histogram.numel;
  a.most = buffers.min_val.type == Element::f64 ? largest_of(double{}) : largest_of(float{});
  a.rate = upsample_rate;
  a.times = times;
  with_stored_type(x.type, [&](auto stored) { observe_histogram_of<decltype(stored)>(launcher, a); });
}

void search_histogram_range(Launcher& launcher, const Array& histogram, const Array& min_val,
                            const Array& max_val, int64_t levels, const Array& new_min, const Array& new_max) {
  check_count(min_val, 1);
  check_count(max_val, 1);
  check(histogram.numel > 0 && levels > 0, "a histogram needs bins");
  SearchArgs a = {};
  a.histogram = Buffer(histogram);
  a.min_val = Buffer(min_val);
  a.max_val = Buffer(max_val);
  a.new_min = Buffer(new_min);
  a.new_max = Buffer(new_max);
  a.bins = histogram.numel;
  a.levels = static_cast<double>(levels);
  a.counts = static_cast<float*>(launcher.scratch(3 * sizeof(float) * static_cast<size_t>(a.bins)));
  a.cumulative = a.counts + a.bins;
  a.errors = a.cumulative + a.bins;
  const auto kernel = min_val.type == Element::f64 ? search_range<double> : search_range<float>;
  launch(launcher, kernel, 1, kThreads, sizeof(SearchShared), a);
}

}  // namespace fastquant::cuda
