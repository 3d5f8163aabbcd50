// The min/max reduction, and the update of an observer's statistics and quantization parameters from its
// result.
#pragma once

#include <functional>

#include "reduce.cuh"

namespace fastquant::cuda {

// The buffers that are updated: min_val and max_val, and, unless scale.data is null, the quantization
// parameters.
struct Statistics {
  Buffer min_val, max_val, scale, zero_point, eps;
  bool averages;
  double constant;
  QParamsConfig config;
};

struct MinMaxArgs {
  const void* x;
  Flag enabled;
  // Whether infinities and NaN take part in the reduction. Those that do not are counted in *left_out,
  // unless it is null.
  bool keeps_infinite, keeps_nan;
  int64_t* left_out;
  bool updates;    // write the result to `statistics`
  bool in_double;  // min_val and max_val are float64, so the update is computed in double
  Statistics statistics;
};

// The arguments of a reduction that updates statistics. Under NonFinite::raise, call refuse_nonfinite before
// the reduction is launched.
MinMaxArgs minmax_args(const Dense& x, Flag enabled, const ObserveBuffers& buffers,
                       std::optional<double> averaging_constant, NonFinite policy);

// The arguments of a reduction that only counts the elements that are not finite.
MinMaxArgs counting_args(const Dense& x, Flag enabled, int64_t* left_out);

void add_qparams(const QParamBuffers& qparams, const QParamsConfig& config, Statistics* statistics);

void reduce_minmax(Launcher& launcher, const Dense& x, const MinMaxArgs& args);

// Throws NonfiniteElements if x has NaN or infinities and the observer is enabled. Waits for the device.
void refuse_nonfinite(Launcher& launcher, const Dense& x, Flag enabled);

// The same for elements that `count` counts: it launches kernels that add their number to *left_out.
void refuse_counted(Launcher& launcher, const std::function<void(int64_t* left_out)>& count);

namespace {

// ----------------------------------------------------------------- updating one channel

template <class B>
__device__ void choose_channel(const Statistics& s, int64_t channel, Range<B> range) {
  const auto q = qparams_of<B>(range, read<B>(s.eps), s.config);
  write(s.scale, channel, q.scale);
  write(s.zero_point, channel, q.zero_point);
}

template <class B, class T>
__device__ void update_channel(const Statistics& s, int64_t channel, Range<T> seen) {
  Range<B> range = {read<B>(s.min_val, channel), read<B>(s.max_val, channel)};
  if (!(seen.low > seen.high)) {
    const Range<B> now = {static_cast<B>(rounded_to(s.min_val.type, seen.low)),
                          static_cast<B>(rounded_to(s.max_val.type, seen.high))};
    range = folded<B>(range, now, s.averages, static_cast<B>(s.constant));
    write(s.min_val, channel, range.low);
    write(s.max_val, channel, range.high);
    // Read back, because the buffers may be narrower than B; the parameters must match what they hold.
    range = {read<B>(s.min_val, channel), read<B>(s.max_val, channel)};
  }
  if (s.scale.data != nullptr) choose_channel(s, channel, range);
}

// ------------------------------------------------------------------------------- min/max

// For values that are not NaN. Each is one instruction, unlike Cuda<T>::min and max, whose result for NaN
// math/vector.h prescribes.
__device__ inline float lesser(float a, float b) { return fminf(a, b); }
__device__ inline float greater(float a, float b) { return fmaxf(a, b); }
__device__ inline double lesser(double a, double b) { return fmin(a, b); }
__device__ inline double greater(double a, double b) { return fmax(a, b); }

template <class T>
struct Extremes {
  T low, high;

  FASTQUANT_HD static Extremes nothing() { return {infinity<T>(), -infinity<T>()}; }
  FASTQUANT_HD static Extremes both(const Extremes& a, const Extremes& b) {
    return {least(a.low, b.low), greatest(a.high, b.high)};
  }
};

template <class Stored, int kColumns>
class MinMax : public ChannelOp {
 public:
  using Args = MinMaxArgs;
  using S = Stored;
  using T = Compute<S>;
  using Partial = Extremes<T>;
  using Loaded = Pack<S>;
  static constexpr int kUnroll = 4;

  __device__ static bool begins(const Args& args) { return is_on(args.enabled); }

  __device__ MinMax(const Args& args, const int64_t (&)[kColumns])
      : x_(static_cast<const S*>(args.x)), keeps_infinite_(args.keeps_infinite), keeps_nan_(args.keeps_nan) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      low_[c] = infinity<T>();
      high_[c] = -infinity<T>();
    }
  }

  __device__ Loaded load(int64_t i) const { return load_whole<Loaded>(x_ + i); }

  __device__ void fold(const Loaded& loaded, int64_t) {
    T values[Loaded::N];
    // The sum of all values times 0: it is 0 unless one of them is NaN or infinite.
    T probe = 0;
#pragma unroll
    for (int j = 0; j < Loaded::N; ++j) {
      values[j] = to_compute(loaded.at(j));
      probe = Cuda<T>::madd(values[j], T{0}, probe);
    }
    if (probe == 0) {
#pragma unroll
      for (int j = 0; j < Loaded::N; ++j) take(values[j], kColumns == 1 ? 0 : j);
    } else {
#pragma unroll
      for (int j = 0; j < Loaded::N; ++j) take_any(values[j], kColumns == 1 ? 0 : j);
    }
  }

  __device__ void take_any(T value, int column) {
    const bool nan = value != value, finite = value - value == 0;
    if (finite || (!nan && keeps_infinite_)) {
      take(value, column);
    } else {
      ++left_out_;
      if (nan && keeps_nan_) nan_ |= 1u << column;
    }
  }

  __device__ void fold_one(int64_t i, int column) { take_any(to_compute(x_[i]), column); }

  __device__ Partial partial(int column) const {
    if (nan_ >> column & 1u) return {static_cast<T>(__builtin_nan("")), static_cast<T>(__builtin_nan(""))};
    return {low_[column], high_[column]};
  }

  __device__ void leave(const Args& args) const {
    if (args.left_out == nullptr || !__any_sync(kAllLanes, left_out_ > 0)) return;
    unsigned long long total = left_out_;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    if (threadIdx.x % kWarp == 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.left_out), total);
  }

  __device__ static void finish(const Args& args, int64_t channel, const Partial& p) {
    if (!args.updates) return;
    const Range<T> seen = {p.low, p.high};
    if (args.in_double) {
      update_channel<double>(args.statistics, channel, seen);
    } else {
      update_channel<float>(args.statistics, channel, seen);
    }
  }

 private:
  __device__ void take(T value, int column) {
    low_[column] = lesser(value, low_[column]);
    high_[column] = greater(value, high_[column]);
  }

  const S* x_;
  T low_[kColumns], high_[kColumns];
  unsigned nan_ = 0;  // bit c is set if column c has a NaN
  unsigned left_out_ = 0;
  bool keeps_infinite_, keeps_nan_;
};

// MinMax of what a Source makes of elements. `Source::Args` has a member `minmax`; a Source has the constructor
// and the functions load and Loaded of an Op, and
//
//   at(loaded, j, column)   what it makes of element j of `loaded`, which belongs to that column
//   one(i, column)          what it makes of element i
template <class Source, int kColumns>
class MinMaxOf : public ChannelOp {
 public:
  using Args = typename Source::Args;
  using S = typename Source::S;
  using Loaded = typename Source::Loaded;
  using Partial = typename MinMax<S, kColumns>::Partial;
  static constexpr int kUnroll = 2;

  __device__ static bool begins(const Args& args) { return MinMax<S, kColumns>::begins(args.minmax); }

  __device__ MinMaxOf(const Args& args, const int64_t (&channels)[kColumns])
      : source_(args, channels), minmax_(args.minmax, channels) {}

  __device__ Loaded load(int64_t i) const { return source_.load(i); }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> made = {};
#pragma unroll
    for (int j = 0; j < Pack<S>::N; ++j) made.put(j, source_.at(loaded, j, kColumns == 1 ? 0 : j));
    minmax_.fold(made, i);
  }

  __device__ void fold_one(int64_t i, int column) {
    minmax_.take_any(to_compute(source_.one(i, column)), column);
  }

  __device__ Partial partial(int column) const { return minmax_.partial(column); }
  __device__ void leave(const Args& args) const { minmax_.leave(args.minmax); }

  __device__ static void finish(const Args& args, int64_t channel, const Partial& p) {
    MinMax<S, kColumns>::finish(args.minmax, channel, p);
  }

 private:
  Source source_;
  MinMax<S, kColumns> minmax_;
};

}  // namespace
}  // namespace fastquant::cuda
