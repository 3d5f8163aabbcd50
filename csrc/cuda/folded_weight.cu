// Weights folded with batch norm: observed, quantized, and their gradients.
#include "../math/folded_weight.h"
#include "fake_quantize.cuh"
#include "observe.cuh"

namespace fastquant::cuda {
namespace {

constexpr int kColumnThreads = 256;

// The tensor `fold` that the ops share: kFoldRows rows with one value for each channel.
template <class T>
__device__ ChannelFold<T> fold_at(const void* fold, int64_t channels, int64_t c) {
  const T* f = static_cast<const T*>(fold) + c;
  return {f[0], f[channels], f[2 * channels], f[3 * channels], f[4 * channels]};
}

// ------------------------------------------------------------------------------- observe

struct ObserveWeightArgs {
  MinMaxArgs minmax;  // of the products of the weight and s
  const void *bn_weight, *bn_std;
  int64_t channels;
  bool per_channel;  // each channel has a range of its own
  bool empty;        // there is no element
  Flag quantizes;
  void* extremes;  // where all channels have one range: those of each channel
  void* fold;
};

template <class S>
__device__ Compute<S> s_of(const ObserveWeightArgs& args, int64_t channel) {
  using T = Compute<S>;
  const T bn_weight = to_compute(static_cast<const S*>(args.bn_weight)[channel]);
  return as_stored<S, Cuda<T>>(bn_weight / to_compute(static_cast<const S*>(args.bn_std)[channel]));
}

// A Source of MinMaxOf (see observe.cuh): the products, zeros where s is 0.
template <class Stored, int kColumns>
class Products {
 public:
  using Args = ObserveWeightArgs;
  using S = Stored;
  using T = Compute<S>;
  using Loaded = Pack<S>;

  __device__ Products(const Args& args, const int64_t (&channels)[kColumns])
      : weight_(static_cast<const S*>(args.minmax.x)) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) s_[c] = s_of<S>(args, channels[c]);
  }

  __device__ Loaded load(int64_t i) const { return load_whole<Loaded>(weight_ + i); }
  __device__ S at(const Loaded& loaded, int j, int column) const { return product(loaded.at(j), column); }
  __device__ S one(int64_t i, int column) const { return product(weight_[i], column); }

 private:
  __device__ S product(S weight, int column) const {
    S product;
    from_compute(&product, s_[column] == 0 ? T{0} : to_compute(weight) * s_[column]);
    return product;
  }

  const S* weight_;
  T s_[kColumns];
};

template <class Stored, int kColumns>
class ObserveWeight : public MinMaxOf<Products<Stored, kColumns>, kColumns> {
 public:
  using Base = MinMaxOf<Products<Stored, kColumns>, kColumns>;
  using Args = ObserveWeightArgs;
  using S = Stored;
  using T = Compute<S>;
  using typename Base::Partial;
  static constexpr bool kConcludes = true;

  using Base::Base;

  __device__ static bool begins(const Args& args) { return !args.empty && Base::begins(args); }

  __device__ static void finish(const Args& args, int64_t channel, const Partial& p) {
    if (!args.per_channel) {
      static_cast<Partial*>(args.extremes)[channel] = p;
      return;
    }
    Base::finish(args, channel, p);
    store_fold(args, channel);
  }

  __device__ static void conclude(const Args& args, void* shared) {
    const bool begun = begins(args);
    if (begun && args.per_channel) return;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (begun) {
      const auto* extremes = static_cast<const Partial*>(args.extremes);
      Partial p = Partial::nothing();
      for (int64_t c = thread; c < args.channels; c += threads) p = Partial::both(p, read_fresh(extremes + c));
      p = over_block(p, static_cast<Partial*>(shared));
      if (thread == 0) Base::finish(args, 0, p);
    } else if (is_on(args.minmax.enabled)) {
      const int64_t ranges = args.per_channel ? args.channels : 1;
      for (int64_t c = thread; c < ranges; c += threads) Base::finish(args, c, Partial::nothing());
    }
    __syncthreads();
    for (int64_t c = thread; c < args.channels; c += threads) store_fold(args, c);
  }

 private:
  // Called by a thread of the block that has chosen the channel's scale and zero point, if any has.
  __device__ static void store_fold(const Args& args, int64_t channel) {
    if (!args.minmax.updates) return;
    const Statistics& statistics = args.minmax.statistics;
    const int64_t range = args.per_channel ? channel : 0;
    const T scale = read<T>(statistics.scale, range);
    T* fold = static_cast<T*>(args.fold) + channel;
    fold[0] = is_on(args.quantizes) ? s_of<S>(args, channel) : T{0};
    fold[args.channels] = to_compute(static_cast<const S*>(args.bn_std)[channel]);
    fold[2 * args.channels] = scale;
    fold[3 * args.channels] = reciprocal(scale, statistics.scale.type == Element::f64);
    fold[4 * args.channels] = read<T>(statistics.zero_point, range);
  }
};

void observe_products(Launcher& launcher, const Dense& weight, ObserveWeightArgs args) {
  with_stored_type(weight.type, [&](auto stored) {
    using S = decltype(stored);
    using Op = ObserveWeight<S, 1>;
    using P = typename Op::Partial;
    if (args.empty) {
      launch_conclusion<Op>(launcher, args);
      return;
    }
    if (!args.per_channel) args.extremes = launcher.scratch(sizeof(P) * static_cast<size_t>(weight.channels));
    reduce_channels<ObserveWeight, S, kColumnThreads>(launcher, weight, {weight.data}, args);
  });
}

// ------------------------------------------------------------------- values and gradients

struct FoldArgs {
  const void *weight, *grad;
  void* out;
  const void* fold;
  int64_t channels;
  int64_t quant_min, quant_max;
  Buffer grad_bn_weight;
};

// What is done to the elements of one channel.
template <class S>
class Folder {
 public:
  using T = Compute<S>;

  Folder() = default;
  __device__ Folder(const FoldArgs& args, int64_t channel) : channel_(static_cast<int>(channel)) {
    const ChannelFold<T> fold = fold_at<T>(args.fold, args.channels, channel);
    const auto params = fastquant::params_of(fold, args.quant_min, args.quant_max);
    fast_ = {fold.s, quantizer_of(params)};
    exact_ = params.exact;
  }

  __device__ bool keeps() const { return fast_.s == 0; }

  __device__ T folded(const FoldArgs& args, T weight) const {
    if (keeps()) return weight;
    return exact_ ? folded_exactly(args, channel_, weight) : fast_.folded(weight);
  }

  __device__ T gradient(const FoldArgs& args, T grad, T weight, T* grad_weight) const {
    if (keeps()) {
      *grad_weight = grad;
      return 0;
    }
    return exact_ ? gradient_exactly(args, channel_, grad, weight, grad_weight)
                  : fast_.gradient(grad, weight, grad_weight);
  }

 private:
  __device__ static ExactWeightFolder<S, Cuda<T>> exact(const FoldArgs& args, int channel) {
    const ChannelFold<T> fold = fold_at<T>(args.fold, args.channels, channel);
    return {fold.s, {fold.scale, fold.inverse_scale, fold.zero_point, args.quant_min, args.quant_max, false}};
  }

  __device__ __noinline__ static T folded_exactly(const FoldArgs& args, int channel, T weight) {
    return exact(args, channel).folded(weight);
  }

  __device__ __noinline__ static T gradient_exactly(const FoldArgs& args, int channel, T grad, T weight,
                                                    T* grad_weight) {
    return exact(args, channel).gradient(grad, weight, grad_weight);
  }

  WeightFolder<S, Cuda<T>> fast_;
  int channel_;
  bool exact_;
};

template <class Stored, int kColumns>
class FoldOp : public ChannelOp {
 public:
  using Args = FoldArgs;
  using S = Stored;
  using T = Compute<S>;
  static constexpr int N = Pack<S>::N;
  static constexpr int kUnroll = 2;

  __device__ static bool begins(const Args&) { return true; }
  __device__ void leave(const Args&) const {}

 protected:
  __device__ FoldOp(const Args& args, const int64_t (&channels)[kColumns]) : args_(args) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) folders_[c] = Folder<S>(args, channels[c]);
  }

  __device__ const S* weight() const { return static_cast<const S*>(args_.weight); }
  __device__ const S* grad() const { return static_cast<const S*>(args_.grad); }
  __device__ S* out() const { return static_cast<S*>(args_.out); }

  const Args& args_;
  Folder<S> folders_[kColumns];
};

template <class Stored, int kColumns>
class Fold : public FoldOp<Stored, kColumns> {
 public:
  using Base = FoldOp<Stored, kColumns>;
  using typename Base::Args;
  using typename Base::S;
  using Partial = unsigned;
  using Loaded = Pack<S>;
  static constexpr bool kReduces = false;

  __device__ Fold(const Args& args, const int64_t (&channels)[kColumns]) : Base(args, channels) {}

  __device__ Loaded load(int64_t i) const { return load_whole<Loaded>(this->weight() + i); }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> out = {};
#pragma unroll
    for (int j = 0; j < Base::N; ++j) out.put(j, folded(loaded.at(j), kColumns == 1 ? 0 : j));
    store_whole(this->out() + i, out);
  }

  __device__ void fold_one(int64_t i, int column) { this->out()[i] = folded(this->weight()[i], column); }

 private:
  __device__ S folded(S weight, int column) const {
    S out;
    from_compute(&out, this->folders_[column].folded(this->args_, to_compute(weight)));
    return out;
  }
};

struct Total {
  double value;

  FASTQUANT_HD static Total nothing() { return {0}; }
  FASTQUANT_HD static Total both(const Total& a, const Total& b) { return {a.value + b.value}; }
};

template <class Stored, int kColumns>
class FoldGradient : public FoldOp<Stored, kColumns> {
 public:
  using Base = FoldOp<Stored, kColumns>;
  using typename Base::Args;
  using typename Base::S;
  using typename Base::T;
  using Partial = Total;
  struct Loaded {
    Pack<S> grad, weight;
  };

  __device__ FoldGradient(const Args& args, const int64_t (&channels)[kColumns]) : Base(args, channels) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) totals_[c] = 0;
  }

  __device__ Loaded load(int64_t i) const {
    return {load_whole<Pack<S>>(this->grad() + i), load_whole<Pack<S>>(this->weight() + i)};
  }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> out = {};
    T sum = 0;  // of so few terms that T is accurate enough
#pragma unroll
    for (int j = 0; j < Base::N; ++j) {
      T grad_weight;
      const int column = kColumns == 1 ? 0 : j;
      const T term = take(loaded.grad.at(j), loaded.weight.at(j), column, &grad_weight);
      S element;
      from_compute(&element, grad_weight);
      out.put(j, element);
      if (kColumns == 1) {
        sum += term;
      } else {
        totals_[column] += static_cast<double>(term);
      }
    }
    if (kColumns == 1) totals_[0] += static_cast<double>(sum);
    store_whole(this->out() + i, out);
  }

  __device__ void fold_one(int64_t i, int column) {
    T grad_weight;
    totals_[column] += static_cast<double>(take(this->grad()[i], this->weight()[i], column, &grad_weight));
    from_compute(this->out() + i, grad_weight);
  }

  __device__ Partial partial(int column) const { return {totals_[column]}; }

  __device__ static void finish(const Args& args, int64_t channel, const Partial& total) {
    const ChannelFold<T> fold = fold_at<T>(args.fold, args.channels, channel);
    const double s = static_cast<double>(fold.s), bn_std = static_cast<double>(fold.bn_std);
    write(args.grad_bn_weight, channel, s == 0 ? 0.0 : total.value / s / bn_std);
  }

 private:
  __device__ T take(S grad, S weight, int column, T* grad_weight) const {
    return this->folders_[column].gradient(this->args_, to_compute(grad), to_compute(weight), grad_weight);
  }

  double totals_[kColumns];
};

FoldArgs fold_args(const Dense& weight, const Array& fold, QuantRange range, void* out) {
  check(fold.type == (weight.type == Element::f64 ? Element::f64 : Element::f32), "fold has another dtype");
  check_count(fold, kFoldRows * weight.channels);
  FoldArgs args = {};
  args.weight = weight.data;
  args.out = out;
  args.fold = fold.data;
  args.channels = weight.channels;
  args.quant_min = range.min;
  args.quant_max = range.max;
  return args;
}

}  // namespace

void observe_folded_weight(Launcher& launcher, const Dense& weight, const Array& bn_weight, const Array& bn_std,
                           Flag observes, Flag quantizes, const ObserveBuffers& buffers,
                           const QParamBuffers& qparams, const ObserveSettings& settings, void* folded,
                           const Array& fold) {
  for (const Array& a : {bn_weight, bn_std}) {
    check_count(a, weight.channels);
    check(a.type == weight.type, a.name, " must have weight's dtype");
  }
  const bool per_channel = settings.ch_axis.has_value();
  Dense ranges = weight;
  if (!per_channel) ranges.channels = 1;
  for (const Array& a : {qparams.scale, qparams.zero_point}) check_count(a, ranges.channels);
  const QuantRange range = {settings.qparams.quant_min, settings.qparams.quant_max};
  fold_args(weight, fold, range, folded);
  ObserveWeightArgs args = {};
  args.minmax = minmax_args(ranges, observes, buffers, settings.averaging_constant, settings.nonfinite);
  add_qparams(qparams, settings.qparams, &args.minmax.statistics);
  args.bn_weight = bn_weight.data;
  args.bn_std = bn_std.data;
  args.channels = weight.channels;
  args.per_channel = per_channel;
  args.empty = weight.numel() == 0;
  args.quantizes = quantizes;
  args.fold = fold.data;
  if (settings.nonfinite == NonFinite::raise) {
    refuse_counted(launcher, [&](int64_t* left_out) {
      ObserveWeightArgs counting = args;
      counting.minmax = counting_args(weight, observes, left_out);
      observe_products(launcher, weight, counting);
    });
  }
  observe_products(launcher, weight, args);
  fold_weight(launcher, weight, fold, range, folded);
}

void fold_weight(Launcher& launcher, const Dense& weight, const Array& fold, QuantRange range, void* folded) {
  const FoldArgs args = fold_args(weight, fold, range, folded);
  if (weight.numel() == 0) return;
  with_stored_type(weight.type, [&](auto stored) {
    reduce_channels<Fold, decltype(stored), kColumnThreads>(launcher, weight, {weight.data, folded}, args);
  });
}

void fold_weight_backward(Launcher& launcher, const Dense& weight, const void* grad, const Array& fold,
                          QuantRange range, void* grad_weight, const Array& grad_bn_weight) {
  FoldArgs args = fold_args(weight, fold, range, grad_weight);
  check_count(grad_bn_weight, weight.channels);
  args.grad = grad;
  args.grad_bn_weight = Buffer(grad_bn_weight);
  if (weight.numel() == 0) {
    clear(launcher, grad_bn_weight);
    return;
  }
  with_stored_type(weight.type, [&](auto stored) {
    reduce_channels<FoldGradient, decltype(stored), kColumnThreads>(launcher, weight,
                                                                    {weight.data, grad, grad_weight}, args);
  });
}

}  // namespace fastquant::cuda
