// Batch norm, an activation that clamps, observe and fake-quantize: statistics, values and gradients.
#include "../math/batch_norm.h"
#include "../math/clamped_sum.h"
#include "fake_quantize.cuh"
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

// The block size of reduce_columns for the Ops below.
constexpr int kColumnThreads = 256;

// The tensor `norm`: four rows with one value for each channel.
template <class T>
__device__ ChannelNorm<T> norm_at(const void* norm, int64_t channels, int64_t channel) {
  const T* values = static_cast<const T*>(norm) + channel;
  return {values[0], values[channels], values[2 * channels], values[3 * channels]};
}

template <class T>
__device__ T normalized(const ChannelNorm<T>& norm, T x) {
  const Normalizer<Cuda<T>> normalizer = {norm.mean, norm.gain, norm.bias};
  return normalizer.normalized(normalizer.centred(x));
}

// ---------------------------------------------------------------------------- statistics

enum NonfiniteBits : unsigned { kPlusInfinity = 1, kMinusInfinity = 2, kNaN = 4 };
constexpr int kNonfiniteBits = 3;

// The elements of a part of a channel.
template <class T>
struct Summary {
  double mean, squares;  // squares: the sum of the squared distances from the mean
  int64_t count;
  Extremes<T> extremes;  // of the finite elements
  unsigned nonfinite;    // which other elements there are: bits of NonfiniteBits

  FASTQUANT_HD static Summary nothing() { return {0, 0, 0, Extremes<T>::nothing(), 0}; }

  // Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
  // Symmetric in a and b, so that all lanes of a warp get the same.
  FASTQUANT_HD static Summary both(const Summary& a, const Summary& b) {
    Summary s = {0, 0, a.count + b.count, Extremes<T>::both(a.extremes, b.extremes), a.nonfinite | b.nonfinite};
    if (s.count == 0) return s;
    const double count_a = static_cast<double>(a.count), count_b = static_cast<double>(b.count);
    const double count = count_a + count_b, distance = a.mean - b.mean;
    s.mean = (a.mean * count_a + b.mean * count_b) / count;
    s.squares = (a.squares + b.squares) + distance * distance * (count_a * count_b / count);
    return s;
  }
};

// What a channel adds to the range of the tensor that is quantized.
template <class T>
struct Contribution {
  enum Kind { kRange, kAllNaN, kUnknown };

  Extremes<T> extremes;
  int kind;  // kUnknown: extremes and statistics have to be computed by survey()
};

// The range of several channels, and how many elements it leaves out.
template <class T>
struct Seen {
  Extremes<T> extremes;
  int64_t left_out;

  FASTQUANT_HD static Seen nothing() { return {Extremes<T>::nothing(), 0}; }
  FASTQUANT_HD static Seen both(const Seen& a, const Seen& b) {
    return {Extremes<T>::both(a.extremes, b.extremes), a.left_out + b.left_out};
  }
};

struct Total {
  double value;

  FASTQUANT_HD static Total nothing() { return {0}; }
  FASTQUANT_HD static Total both(const Total& a, const Total& b) { return {a.value + b.value}; }
};

struct StatisticsArgs {
  MinMaxArgs minmax;  // of the tensor that is quantized
  Flag quantizes;
  int64_t channels, count;  // count: elements of a channel
  Divider inner;
  bool training;
  double momentum, eps, low, high;
  Buffer weight, bias, running_mean, running_var;
  void* norm;
  double* quantizer;
  void* contributions;
  // Where only the number of non-finite elements is written, and nothing else is changed; null otherwise.
  int64_t* only_counts;
};

// An Op (see reduce.cuh) that computes batch statistics and the range after batch norm and activation.
template <class Stored, int kColumns>
class BatchStatistics : public ChannelOp {
 public:
  using Args = StatisticsArgs;
  using S = Stored;
  using T = Compute<S>;
  using Partial = Summary<T>;
  using Loaded = Pack<S>;
  static constexpr int N = Pack<S>::N;
  static constexpr int kUnroll = 4;
  static constexpr bool kConcludes = true;

  __device__ static bool begins(const Args& args) {
    if (args.count == 0) return false;
    return (args.training && args.only_counts == nullptr) || is_on(args.minmax.enabled);
  }

  __device__ BatchStatistics(const Args& args, const int64_t (&)[kColumns])
      : x_(static_cast<const S*>(args.minmax.x)), training_(args.training) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shift_[c] = mean_[c] = squares_[c] = 0;
      extremes_[c] = Extremes<T>::nothing();
      count_[c] = 0;
    }
  }

  __device__ Loaded load(int64_t i) const { return load_whole<Loaded>(x_ + i); }

  __device__ void fold(const Loaded& loaded, int64_t) {
    T values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[j] = to_compute(loaded.at(j));
      take_extremes(values[j], kColumns == 1 ? 0 : j);
    }
    if (!training_) return;
    if constexpr (kColumns == 1) {
      add_pack(values);
    } else {
      // The columns have equal counts, since reduce_columns calls fold_one only after the last fold.
      const T weight = T{1} / static_cast<T>(count_[0] + 1);
#pragma unroll
      for (int j = 0; j < N; ++j) add(values[j], weight, j);
    }
  }

  __device__ void fold_one(int64_t i, int column) {
    const T value = to_compute(x_[i]);
    take_extremes(value, column);
    if (training_) add(value, T{1} / static_cast<T>(count_[column] + 1), column);
  }

  __device__ Partial partial(int column) const {
    return {static_cast<double>(shift_[column]) + static_cast<double>(mean_[column]),
            static_cast<double>(squares_[column]), count_[column], extremes_[column],
            nonfinite_ >> (column * kNonfiniteBits) & ((1u << kNonfiniteBits) - 1)};
  }

  __device__ void leave(const Args&) const {}

  __device__ static void finish(const Args& args, int64_t channel, const Partial& p) {
    auto* contribution = static_cast<Contribution<T>*>(args.contributions) + channel;
    *contribution = {Extremes<T>::nothing(), Contribution<T>::kUnknown};
    double variance = p.squares / static_cast<double>(args.count), mean = p.mean;
    if (args.training) {
      // The squares of huge finite elements overflow in T.
      if (p.nonfinite == 0 && !is_within(variance, largest<double>())) return;
      if (p.nonfinite != 0) {
        mean = mean_with(p.nonfinite);
        variance = nan();
      }
    }
    const ChannelNorm<T> norm = norm_of(args, channel, &mean, &variance);
    if (args.training && p.nonfinite != 0) {
      contribution->kind = Contribution<T>::kAllNaN;
    } else {
      // Batch norm and the activation are monotone: the extremes of their result are the results of the
      // extremes.
      const T a = activation_of(args, normalized(norm, p.extremes.low));
      const T b = activation_of(args, normalized(norm, p.extremes.high));
      if (p.nonfinite != 0 || a - a != 0 || b - b != 0) return;
      *contribution = {{lesser(a, b), greater(a, b)}, Contribution<T>::kRange};
    }
    store_channel(args, channel, norm, mean, variance);
  }

  // Called by all threads of a block.
  __device__ static void conclude(const Args& args, void* shared) {
    const bool begun = begins(args);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const auto* contributions = static_cast<const Contribution<T>*>(args.contributions);
    auto* seen_by_warps = static_cast<Seen<T>*>(shared);
    static_assert(sizeof(Seen<T>) <= sizeof(Partial), "there is shared memory for Partials");
    Seen<T> seen = Seen<T>::nothing();
    bool unknown = false;
    for (int64_t c = thread; c < args.channels; c += threads) {
      if (!begun) {
        double mean = 0, variance = 0;
        const ChannelNorm<T> norm = norm_of(args, c, &mean, &variance);
        store_channel(args, c, norm, mean, variance);
        continue;
      }
      const Contribution<T> own = read_fresh(contributions + c);
      unknown |= own.kind == Contribution<T>::kUnknown;
      if (own.kind == Contribution<T>::kRange) seen.extremes = Extremes<T>::both(seen.extremes, own.extremes);
      if (own.kind == Contribution<T>::kAllNaN) add_nonfinite(args, nan(), args.count, &seen);
    }
    seen = over_block(seen, seen_by_warps);
    if (__syncthreads_or(unknown)) {
      for (int64_t c = 0; c < args.channels; ++c) {
        const Contribution<T> own = read_fresh(contributions + c);
        if (own.kind == Contribution<T>::kUnknown) seen = Seen<T>::both(seen, survey(args, c, shared));
      }
    }
    if (thread == 0) update(args, seen);
  }

 private:
  // The mean of elements of which some are not finite.
  __device__ static double mean_with(unsigned nonfinite) {
    if (nonfinite == kPlusInfinity) return infinity<double>();
    return nonfinite == kMinusInfinity ? -infinity<double>() : __builtin_nan("");
  }

  __device__ static T nan() { return static_cast<T>(__builtin_nan("")); }

  __device__ static T activation_of(const Args& args, T x) {
    return clamped<Cuda<T>>(x, static_cast<T>(args.low), static_cast<T>(args.high));
  }

  __device__ void take_extremes(T value, int column) {
    if (value - value == 0) {
      extremes_[column] = {lesser(value, extremes_[column].low), greater(value, extremes_[column].high)};
    } else {
      const unsigned kind = value > 0 ? kPlusInfinity : value < 0 ? kMinusInfinity : kNaN;
      nonfinite_ |= kind << (column * kNonfiniteBits);
    }
  }

  // Adds one element to the mean and the squares (Welford's method). Elements are taken relative to the first
  // one, which loses nothing where they are much larger than their distances from each other. `weight` is
  // the reciprocal of the new count.
  __device__ void add(T value, T weight, int column) {
    if (count_[column]++ == 0) shift_[column] = value;
    const T shifted = value - shift_[column], distance = shifted - mean_[column];
    mean_[column] = Cuda<T>::madd(distance, weight, mean_[column]);
    squares_[column] = Cuda<T>::madd(distance, shifted - mean_[column], squares_[column]);
  }

  // The same for N elements of one channel: first their own mean and squares, then these are added as in
  // Summary.
  __device__ void add_pack(const T (&values)[N]) {
    if (count_[0] == 0) shift_[0] = values[0];
    T shifted[N], sum = 0, squares = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += shifted[j] = values[j] - shift_[0];
    const T mean = sum * (T{1} / N);
#pragma unroll
    for (int j = 0; j < N; ++j) squares = Cuda<T>::madd(shifted[j] - mean, shifted[j] - mean, squares);
    const T before = static_cast<T>(count_[0]), distance = mean - mean_[0];
    const T weight = T{N} / (before + T{N});
    mean_[0] = Cuda<T>::madd(distance, weight, mean_[0]);
    squares_[0] += Cuda<T>::madd(distance * distance, weight * before, squares);
    count_[0] += N;
  }

  __device__ static bool has_batch_statistics(const Args& args) { return args.training && args.count > 0; }

  // `variance` is that of the elements themselves, without Bessel's correction. In evaluation, mean and
  // variance become the running ones.
  __device__ static ChannelNorm<T> norm_of(const Args& args, int64_t channel, double* mean, double* variance) {
    if (!has_batch_statistics(args)) {
      *mean = read<double>(args.running_mean, channel);
      *variance = read<double>(args.running_var, channel);
    }
    return channel_norm(*mean, *variance, args.eps, read<T>(args.weight, channel), read<T>(args.bias, channel));
  }

  __device__ static void store_channel(const Args& args, int64_t channel, const ChannelNorm<T>& norm,
                                       double mean, double variance) {
    if (args.only_counts != nullptr) return;
    if (has_batch_statistics(args)) {
      const double count = static_cast<double>(args.count);
      move(args, args.running_mean, channel, mean);
      move(args, args.running_var, channel, variance * (count / (count - 1)));
    }
    T* out = static_cast<T*>(args.norm) + channel;
    out[0] = norm.mean;
    out[args.channels] = norm.invstd;
    out[2 * args.channels] = norm.gain;
    out[3 * args.channels] = norm.bias;
  }

  __device__ static void move(const Args& args, Buffer running, int64_t channel, double value) {
    write(running, channel, moved_statistic(read<double>(running, channel), value, args.momentum));
  }

  // Takes `count` elements of a value that is not finite into account.
  __device__ static void add_nonfinite(const Args& args, T value, int64_t count, Seen<T>* seen) {
    const bool is_nan = value != value;
    if (is_nan ? args.minmax.keeps_nan : args.minmax.keeps_infinite) {
      seen->extremes = Extremes<T>::both(seen->extremes, {value, value});
    } else {
      seen->left_out += count;
    }
  }

  __device__ static T element(const Args& args, int64_t channel, int64_t k) {
    const int64_t row = args.inner.quotient(k);
    const int64_t i = (row * args.channels + channel) * args.inner.divisor() + (k - row * args.inner.divisor());
    return to_compute(static_cast<const S*>(args.minmax.x)[i]);
  }

  // Computes the statistics of a channel in double, and looks at each result of batch norm and activation. For
  // channels with non-finite or huge elements, which are rare, so that one block does it for the whole channel.
  __device__ static Seen<T> survey(const Args& args, int64_t channel, void* shared) {
    const int threads = static_cast<int>(blockDim.x);
    const auto sum = [&](const auto& term) {
      Total total = {0};
      for (int64_t k = threadIdx.x; k < args.count; k += threads) {
        total.value += term(static_cast<double>(element(args, channel, k)));
      }
      __syncthreads();
      return over_block(total, static_cast<Total*>(shared)).value;
    };
    double mean = 0, variance = 0;
    if (args.training) {
      const double count = static_cast<double>(args.count);
      mean = sum([](double x) { return x; }) / count;
      variance = sum([&](double x) { return (x - mean) * (x - mean); }) / count;
    }
    const ChannelNorm<T> norm = norm_of(args, channel, &mean, &variance);
    if (threadIdx.x == 0) store_channel(args, channel, norm, mean, variance);
    Seen<T> seen = Seen<T>::nothing();
    for (int64_t k = threadIdx.x; k < args.count; k += threads) {
      const T value = activation_of(args, normalized(norm, element(args, channel, k)));
      if (value - value == 0) {
        seen.extremes = Extremes<T>::both(seen.extremes, {value, value});
      } else {
        add_nonfinite(args, value, 1, &seen);
      }
    }
    __syncthreads();
    return over_block(seen, static_cast<Seen<T>*>(shared));
  }

  // Updates the statistics and parameters of quantization, and copies these to `quantizer`.
  __device__ static void update(const Args& args, const Seen<T>& seen) {
    if (args.only_counts != nullptr) {
      *args.only_counts = seen.left_out;
      return;
    }
    const MinMaxArgs& minmax = args.minmax;
    if (is_on(minmax.enabled)) {
      if (minmax.left_out != nullptr) *minmax.left_out += seen.left_out;
      MinMax<S, 1>::finish(minmax, 0, seen.extremes);
    }
    args.quantizer[0] = read<double>(minmax.statistics.scale);
    args.quantizer[1] = read<double>(minmax.statistics.zero_point);
    args.quantizer[2] = is_on(args.quantizes) ? 1 : 0;
  }

  const S* x_;
  bool training_;
  T shift_[kColumns], mean_[kColumns], squares_[kColumns];  // the mean of x is shift + mean
  Extremes<T> extremes_[kColumns];
  int count_[kColumns];
  unsigned nonfinite_ = 0;  // NonfiniteBits of each column
};

void compute_statistics(Launcher& launcher, const Dense& x, StatisticsArgs args) {
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    args.contributions = launcher.scratch(sizeof(Contribution<Compute<S>>) * static_cast<size_t>(x.channels));
    if (args.count == 0) {
      launch_conclusion<BatchStatistics<S, 1>>(launcher, args);
    } else {
      reduce_channels<BatchStatistics, S, kColumnThreads>(launcher, x, {x.data}, args);
    }
  });
}

// -------------------------------------------------------------------- values and gradients

struct ElementArgs {
  const void *x, *grad;
  void* out;
  const void* norm;
  const double* quantizer;  // scale, zero point, whether values are quantized
  int64_t channels;
  double low, high;
  int64_t quant_min, quant_max;
  bool training;
  // The rest is for gradients.
  int64_t count;  // elements of a channel
  void* means;    // GradientMeans of each channel, see GradientSums
  Buffer grad_weight, grad_bias;
};

// The activation, and fake-quantize where it is on, for results of batch norm.
template <class T>
class Quantizing {
 public:
  __device__ explicit Quantizing(const ElementArgs& args)
      : args_(args), bounds_{bound_of_sum<T>(args.low), bound_of_sum<T>(args.high)} {
    const Activation<T> a = activation(args);
    low_ = a.low;
    high_ = a.high;
    normalized_ = {a.quantizer.inverse_scale, a.step_low, a.step_high, a.quantizer.scale};
    low_edge_ = a.quantizer.low_edge;
    high_edge_ = a.quantizer.high_edge;
    way_ = !a.quantizes ? kOff : a.quantizer.exact ? kExact : kFast;
  }

  __device__ T value(T x) const {
    if (way_ == kFast) return normalized_.value(x);
    return way_ == kOff ? clamped<Cuda<T>>(x, low_, high_) : exact_value(args_, x);
  }

  // Whether the gradient passes: not at the bounds of the activation, as for torch's ReLU and Hardtanh.
  __device__ bool passes(T x) const {
    if (!bounds_.passes(x)) return false;
    if (way_ == kExact) return passes_exactly(args_, x);
    const T steps = x * normalized_.inverse_scale;
    return way_ == kOff || !(steps < low_edge_ || steps > high_edge_);
  }

 private:
  enum Way { kOff, kFast, kExact };

  __device__ static Activation<T> activation(const ElementArgs& a) {
    return activation_for_values<Cuda<T>>(a.quantizer, a.low, a.high, a.quant_min, a.quant_max);
  }

  __device__ __noinline__ static T exact_value(const ElementArgs& args, T x) {
    return activated<Cuda<T>>(activation(args), x);
  }

  __device__ __noinline__ static bool passes_exactly(const ElementArgs& args, T x) {
    const Activation<T> a = activation(args);
    return x != x || (is_inside<Cuda<T>>(a, x, -1) && is_inside<Cuda<T>>(a, x, 1));
  }

  const ElementArgs& args_;
  ClampedSum<Cuda<T>> bounds_;
  NormalizedQuantizer<Cuda<T>> normalized_;
  T low_, high_, low_edge_, high_edge_;
  Way way_;
};

// What the Ops below have in common: they take each element on its own.
template <class Stored, int kColumns>
class ElementOp : public ChannelOp {
 public:
  using Args = ElementArgs;
  using S = Stored;
  using T = Compute<S>;
  static constexpr int N = Pack<S>::N;
  static constexpr int kUnroll = 2;

  __device__ static bool begins(const Args&) { return true; }
  __device__ void leave(const Args&) const {}

 protected:
  __device__ ElementOp(const Args& args, const int64_t (&channels)[kColumns]) : args_(args), quantizing_(args) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) norms_[c] = norm_at<T>(args.norm, args.channels, channels[c]);
  }

  __device__ const S* x() const { return static_cast<const S*>(args_.x); }
  __device__ const S* grad() const { return static_cast<const S*>(args_.grad); }
  __device__ S* out() const { return static_cast<S*>(args_.out); }

  // The gradient after activation and fake-quantize.
  __device__ T passed(T grad, T x, int column) const {
    return quantizing_.passes(normalized(norms_[column], x)) ? grad : T{0};
  }

  const Args& args_;
  Quantizing<T> quantizing_;
  ChannelNorm<T> norms_[kColumns];
};

template <class Stored, int kColumns>
class Values : public ElementOp<Stored, kColumns> {
 public:
  using Base = ElementOp<Stored, kColumns>;
  using typename Base::S;
  using typename Base::T;
  using Args = ElementArgs;
  using Base::N;
  using Partial = unsigned;
  using Loaded = Pack<S>;
  static constexpr bool kReduces = false;

  __device__ Values(const Args& args, const int64_t (&channels)[kColumns]) : Base(args, channels) {}

  __device__ Loaded load(int64_t i) const { return load_whole<Loaded>(this->x() + i); }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> y = {};
#pragma unroll
    for (int j = 0; j < N; ++j) y.put(j, value(loaded.at(j), kColumns == 1 ? 0 : j));
    store_whole(this->out() + i, y);
  }

  __device__ void fold_one(int64_t i, int column) { this->out()[i] = value(this->x()[i], column); }

 private:
  __device__ S value(S x, int column) const {
    S y;
    from_compute(&y, this->quantizing_.value(normalized(this->norms_[column], to_compute(x))));
    return y;
  }
};

template <class S>
struct GradAndX {
  Pack<S> grad, x;
};

// What the Ops of the gradient have in common: they read it along with x.
template <class Stored, int kColumns>
class GradientOp : public ElementOp<Stored, kColumns> {
 public:
  using typename ElementOp<Stored, kColumns>::S;
  using Loaded = GradAndX<S>;

  __device__ Loaded load(int64_t i) const {
    return {load_whole<Pack<S>>(this->grad() + i), load_whole<Pack<S>>(this->x() + i)};
  }

 protected:
  using ElementOp<Stored, kColumns>::ElementOp;
};

struct GradientTotals {
  double bias, gain;

  FASTQUANT_HD static GradientTotals nothing() { return {0, 0}; }
  FASTQUANT_HD static GradientTotals both(const GradientTotals& a, const GradientTotals& b) {
    return {a.bias + b.bias, a.gain + b.gain};
  }
};

// A sum that keeps what its additions round off (Knuth, The Art of Computer Programming, volume 2, 4.2.2).
// Adding in double would take longer than reading the elements on GPUs with few units for it.
template <class T>
class ExactSum {
 public:
  __device__ void add(T x) {
    const T sum = sum_ + x, change = sum - sum_;
    rest_ += (sum_ - (sum - change)) + (x - change);
    sum_ = sum;
  }

  __device__ double value() const {
    const double sum = static_cast<double>(sum_);
    // If the sum is infinite or NaN, so is it without the rest, which is NaN then.
    return sum - sum == 0 ? sum + static_cast<double>(rest_) : sum;
  }

 private:
  T sum_ = 0, rest_ = 0;
};

// Sums the gradient over each channel: by itself, which is the gradient of the bias, and times x - mean,
// which gives that of the weight. In evaluation, where the statistics do not depend on x, it also writes the
// gradient of x. In training, that gradient needs the sums, and `means` takes them to GradientOfX.
template <class Stored, int kColumns>
class GradientSums : public GradientOp<Stored, kColumns> {
 public:
  using Base = GradientOp<Stored, kColumns>;
  using typename Base::S;
  using typename Base::T;
  using Args = ElementArgs;
  using Base::N;
  using Partial = GradientTotals;
  using typename Base::Loaded;

  __device__ GradientSums(const Args& args, const int64_t (&channels)[kColumns]) : Base(args, channels) {}

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> out = {};
#pragma unroll
    for (int j = 0; j < N; ++j) out.put(j, take(loaded.grad.at(j), loaded.x.at(j), kColumns == 1 ? 0 : j));
    if (!this->args_.training) store_whole(this->out() + i, out);
  }

  __device__ void fold_one(int64_t i, int column) {
    const S out = take(this->grad()[i], this->x()[i], column);
    if (!this->args_.training) this->out()[i] = out;
  }

  __device__ Partial partial(int column) const { return {bias_[column].value(), gain_[column].value()}; }

  __device__ static void finish(const Args& args, int64_t channel, const Partial& sums) {
    const T invstd = norm_at<T>(args.norm, args.channels, channel).invstd;
    write(args.grad_weight, channel, sums.gain * static_cast<double>(invstd));
    write(args.grad_bias, channel, sums.bias);
    if (!args.training) return;
    static_cast<GradientMeans<T>*>(args.means)[channel] =
        gradient_means(sums.bias, sums.gain, invstd, args.count);
  }

 private:
  // Adds an element; returns its gradient in evaluation.
  __device__ S take(S grad, S x, int column) {
    const T value = to_compute(x), passed = this->passed(to_compute(grad), value, column);
    const ChannelNorm<T>& norm = this->norms_[column];
    bias_[column].add(passed);
    gain_[column].add(passed * (value - norm.mean));
    S out;
    from_compute(&out, norm.gain * passed);
    return out;
  }

  ExactSum<T> bias_[kColumns], gain_[kColumns];
};

template <class Stored, int kColumns>
class GradientOfX : public GradientOp<Stored, kColumns> {
 public:
  using Base = GradientOp<Stored, kColumns>;
  using typename Base::S;
  using typename Base::T;
  using Args = ElementArgs;
  using Base::N;
  using Partial = unsigned;
  using typename Base::Loaded;
  static constexpr bool kReduces = false;

  __device__ GradientOfX(const Args& args, const int64_t (&channels)[kColumns]) : Base(args, channels) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      means_[c] = static_cast<const GradientMeans<T>*>(args.means)[channels[c]];
  }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> out = {};
#pragma unroll
    for (int j = 0; j < N; ++j) out.put(j, gradient(loaded.grad.at(j), loaded.x.at(j), kColumns == 1 ? 0 : j));
    store_whole(this->out() + i, out);
  }

  __device__ void fold_one(int64_t i, int column) {
    this->out()[i] = gradient(this->grad()[i], this->x()[i], column);
  }

 private:
  __device__ S gradient(S grad, S x, int column) const {
    const T value = to_compute(x), passed = this->passed(to_compute(grad), value, column);
    const ChannelNorm<T>& norm = this->norms_[column];
    S out;
    const GradientMeans<T>& means = means_[column];
    from_compute(&out, gradient_of_x<Cuda<T>>(passed, value - norm.mean, norm.gain, means.offset, means.slope));
    return out;
  }

  GradientMeans<T> means_[kColumns];
};

ElementArgs element_args(const Dense& x, const Array& norm, const Array& quantizer,
                         const BatchNormValues& config) {
  check_count(norm, 4 * x.channels);
  check_count(quantizer, 3);
  check(norm.type == (x.type == Element::f64 ? Element::f64 : Element::f32), "norm has the wrong dtype");
  check(quantizer.type == Element::f64, "quantizer must be float64");
  ElementArgs a = {};
  a.x = x.data;
  a.norm = norm.data;
  a.quantizer = static_cast<const double*>(quantizer.data);
  a.channels = x.channels;
  a.low = config.low;
  a.high = config.high;
  a.quant_min = config.range.min;
  a.quant_max = config.range.max;
  a.training = config.training;
  return a;
}

}  // namespace

void observe_batch_norm(Launcher& launcher, const Dense& x, const BatchNormBuffers& buffers,
                        const BatchNormConfig& config, Flag observes, Flag quantizes,
                        const ObserveBuffers& observed, const QParamBuffers& qparams,
                        const ObserveSettings& settings, void* norm, double* quantizer) {
  for (const Array& a : {buffers.weight, buffers.bias, buffers.running_mean, buffers.running_var}) {
    check_count(a, x.channels);
  }
  for (const Array& a : {qparams.scale, qparams.zero_point}) check_count(a, 1);
  const Dense whole = {x.data, x.type, 1, 1, x.numel()};
  StatisticsArgs args = {};
  args.minmax = minmax_args(whole, observes, observed, settings.averaging_constant, settings.nonfinite);
  add_qparams(qparams, settings.qparams, &args.minmax.statistics);
  args.quantizes = quantizes;
  args.channels = x.channels;
  args.count = x.outer * x.inner;
  args.inner = Divider(std::max<int64_t>(x.inner, 1));
  args.training = config.training;
  args.momentum = config.momentum;
  args.eps = config.eps;
  args.low = config.low;
  args.high = config.high;
  args.weight = Buffer(buffers.weight);
  args.bias = Buffer(buffers.bias);
  args.running_mean = Buffer(buffers.running_mean);
  args.running_var = Buffer(buffers.running_var);
  args.norm = norm;
  args.quantizer = quantizer;
  if (settings.nonfinite == NonFinite::raise) {
    refuse_counted(launcher, [&](int64_t* count) {
      StatisticsArgs counting = args;
      counting.only_counts = count;
      compute_statistics(launcher, x, counting);
    });
  }
  compute_statistics(launcher, x, args);
}

void batch_norm_fake_quantize(Launcher& launcher, const Dense& x, const Array& norm, const Array& quantizer,
                              const BatchNormValues& config, void* y) {
  ElementArgs args = element_args(x, norm, quantizer, config);
  args.out = y;
  if (x.numel() == 0) return;
  with_stored_type(x.type, [&](auto stored) {
    reduce_channels<Values, decltype(stored), kColumnThreads>(launcher, x, {x.data, y}, args);
  });
}

void batch_norm_backward(Launcher& launcher, const Dense& x, const void* grad, const Array& norm,
                         const Array& quantizer, const BatchNormValues& config, void* grad_x,
                         const Array& grad_weight, const Array& grad_bias) {
  for (const Array& a : {grad_weight, grad_bias}) check_count(a, x.channels);
  ElementArgs args = element_args(x, norm, quantizer, config);
  args.grad = grad;
  args.out = grad_x;
  args.grad_weight = Buffer(grad_weight);
  args.grad_bias = Buffer(grad_bias);
  args.count = x.outer * x.inner;
  if (x.numel() == 0) {
    for (const Array& a : {grad_weight, grad_bias}) clear(launcher, a);
    return;
  }
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    if (args.training) {
      args.means = launcher.scratch(sizeof(GradientMeans<Compute<S>>) * static_cast<size_t>(x.channels));
    }
    const std::initializer_list<const void*> operands = {x.data, grad, grad_x};
    reduce_channels<GradientSums, S, kColumnThreads>(launcher, x, operands, args);
    if (args.training) reduce_channels<GradientOfX, S, kColumnThreads>(launcher, x, operands, args);
  });
}

}  // namespace fastquant::cuda
