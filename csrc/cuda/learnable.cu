// Gradients of fake-quantize with a learnable scale and zero point.
#include "../math/learnable.h"
#include "fake_quantize.cuh"

namespace fastquant::cuda {
namespace {

struct LearnableArgs {
  const void *grad, *x;
  void* grad_x;
  QuantizeArgs params;
  double grad_factor;
  Buffer grad_scale, grad_zero_point;
};

struct Sums {
  double scale, zero_point;

  FASTQUANT_HD static Sums nothing() { return {0, 0}; }
  FASTQUANT_HD static Sums both(const Sums& a, const Sums& b) {
    return {a.scale + b.scale, a.zero_point + b.zero_point};
  }
};

// An Op (see reduce.cuh) that writes the gradient of each element of x and sums the gradients of the
// channel's scale and zero point.
template <class Stored, int kColumns>
class Learnable : public ChannelOp {
 public:
  using Args = LearnableArgs;
  using S = Stored;
  using T = Compute<S>;
  using Partial = Sums;
  struct Loaded {
    Pack<S> grad, x;
  };
  static constexpr int N = Pack<S>::N;
  static constexpr int kUnroll = 2;

  __device__ static bool begins(const Args&) { return true; }

  __device__ Learnable(const Args& args, const int64_t (&channels)[kColumns]) : args_(args) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const auto p = params_of<T>(args.params, channels[c]);
      gradients_[c] = LearnableGradients<Cuda<T>>::of(
          p.scale, p.inverse_scale, p.zero_point, static_cast<T>(args.params.quant_min),
          static_cast<T>(args.params.quant_max), static_cast<T>(args.grad_factor));
      sums_[c] = Sums::nothing();
    }
  }

  __device__ Loaded load(int64_t i) const {
    return {load_whole<Pack<S>>(grad() + i), load_whole<Pack<S>>(x() + i)};
  }

  __device__ void fold(const Loaded& loaded, int64_t i) {
    Pack<S> grad_x = {};
    T scale_sum = 0, zero_point_sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int column = kColumns == 1 ? 0 : j;
      const auto terms = gradients_[column](to_compute(loaded.grad.at(j)), to_compute(loaded.x.at(j)));
      S element;
      from_compute(&element, terms.x);
      grad_x.put(j, element);
      if (kColumns == 1) {
        // So few terms can be summed in T without losing accuracy; the sums across packs are double.
        scale_sum += terms.scale;
        zero_point_sum += terms.zero_point;
      } else {
        add(column, terms.scale, terms.zero_point);
      }
    }
    if (kColumns == 1) add(0, scale_sum, zero_point_sum);
    store_whole(this->grad_x() + i, grad_x);
  }

  __device__ void fold_one(int64_t i, int column) {
    const auto terms = gradients_[column](to_compute(grad()[i]), to_compute(x()[i]));
    from_compute(grad_x() + i, terms.x);
    add(column, terms.scale, terms.zero_point);
  }

  __device__ Partial partial(int column) const { return sums_[column]; }

  __device__ void leave(const Args&) const {}

  __device__ static void finish(const Args& args, int64_t channel, const Partial& sums) {
    write(args.grad_scale, channel, sums.scale);
    write(args.grad_zero_point, channel, sums.zero_point);
  }

 private:
  __device__ void add(int column, T scale, T zero_point) {
    sums_[column].scale += static_cast<double>(scale);
    sums_[column].zero_point += static_cast<double>(zero_point);
  }

  __device__ const S* grad() const { return static_cast<const S*>(args_.grad); }
  __device__ const S* x() const { return static_cast<const S*>(args_.x); }
  __device__ S* grad_x() const { return static_cast<S*>(args_.grad_x); }

  const Args& args_;
  LearnableGradients<Cuda<T>> gradients_[kColumns];
  Sums sums_[kColumns];
};

}  // namespace

void learnable_backward(Launcher& launcher, const Dense& x, const void* grad, const Array& scale,
                        const Array& zero_point, QuantRange range, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point) {
  for (const Array& a : {scale, zero_point, grad_scale, grad_zero_point}) check_count(a, x.channels);
  if (x.numel() == 0) {
    for (const Array& a : {grad_scale, grad_zero_point}) clear(launcher, a);
    return;
  }
  LearnableArgs args = {};
  args.grad = grad;
  args.x = x.data;
  args.grad_x = grad_x;
  args.params.scale = Buffer(scale);
  args.params.zero_point = Buffer(zero_point);
  args.params.quant_min = range.min;
  args.params.quant_max = range.max;
  args.params.rounds_zero_point = true;
  args.grad_factor = grad_factor;
  args.grad_scale = Buffer(grad_scale);
  args.grad_zero_point = Buffer(grad_zero_point);
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    reduce_channels<Learnable, S, 256>(launcher, x, {x.data, grad, grad_x}, args);
  });
}

}  // namespace fastquant::cuda
