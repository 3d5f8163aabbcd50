// Batch norm with an activation and fake-quantize on plain memory, in parallel.
//
// Sums are combined chunk by chunk (channel_chunks.h): results do not depend on the number of threads. The
// forward pass reads the tensor twice, for the moments and to normalize it, each time in ascending order: going
// backwards the second time finds more in the caches, but less of it is fetched ahead.
#include "batch_norm.h"

#include "../math/batch_norm.h"
#include "channel_chunks.h"
#include "extremes.h"
#include "locks.h"
#include "statistics.h"
#include "vec_scalar.h"

namespace fastquant {
namespace {

// ----------------------------------------------------------------------------- moments

// Of all elements of a channel.
struct Moments {
  double mean, var, unbiased_var, low, high;
  bool finite;
};

// Combines the moments of chunks. each(f) calls f(channel, moments, count) for all of them, those of a channel
// always in the same order.
template <class Each>
std::vector<Moments> combined_moments(int64_t channels, int64_t count, const Each& each) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  std::vector<Moments> result(channels, Moments{0, 0, 0, kInf, -kInf, true});
  const double total = static_cast<double>(count);
  each([&](int64_t c, const ChunkMoments& part, int64_t n) {
    Moments& m = result[c];
    m.mean += part.mean * (static_cast<double>(n) / total);
    m.low = std::min(m.low, part.low);
    m.high = std::max(m.high, part.high);
    m.finite &= part.finite;
  });
  std::vector<double> squares(channels, 0.0);
  each([&](int64_t c, const ChunkMoments& part, int64_t n) {
    const double distance = part.mean - result[c].mean;
    squares[c] += part.squares + static_cast<double>(n) * distance * distance;
  });
  for (int64_t c = 0; c < channels; ++c) {
    Moments& m = result[c];
    if (!m.finite) squares[c] = std::numeric_limits<double>::quiet_NaN();
    m.var = squares[c] / total;
    m.unbiased_var = squares[c] / (total - 1);
  }
  return result;
}

template <class S>
std::vector<Moments> moments_of(const S* x, const Dense& d) {
  const auto& kernels = kernels_of(S{});
  const int64_t pieces = piece_count(d.numel()), count = d.outer * d.inner;
  if (has_columns(d)) {
    const ColumnChunks chunks(d);
    const int64_t width = chunks.width();
    std::vector<ChunkMoments> parts(chunks.count() * width);
    chunks.in_parallel(pieces, [&](int64_t i) {
      std::vector<Compute<S>> scratch(column_scratch(width));
      std::vector<double> totals(2 * width);
      kernels.moments_of_columns(x + chunks.begin(i), chunks.rows(i), chunks.columns(i), scratch.data(),
                                 totals.data(), &parts[i * width]);
    });
    return combined_moments(d.channels, count, [&](const auto& f) {
      chunks.each_column(
          [&](int64_t i, int64_t c, int64_t channel) { f(channel, parts[i * width + c], chunks.rows(i)); });
    });
  }
  const RowChunks chunks(d);
  std::vector<ChunkMoments> parts(chunks.count());
  chunks.in_parallel<S>(
      pieces, [&](const RowChunk& c) { kernels.moments_of_rows(x + c.begin, c.shape, &parts[c.index]); });
  return combined_moments(d.channels, count, [&](const auto& f) {
    chunks.each<S>([&](const RowChunk& c) { f(c.channel, parts[c.index], c.shape.rows * c.shape.length); });
  });
}

// Moments for statistics that do not depend on x: its extremes alone, if they are wanted.
template <class S>
std::vector<Moments> running_moments(const S* x, const Dense& d, const BatchNorm& bn, bool wants_extremes) {
  const std::vector<double> mean = read_values<double>(bn.running_mean),
                            var = read_values<double>(bn.running_var);
  Extremes<Compute<S>> found(d.channels);
  const bool finite = !wants_extremes || !extremes(x, d, &found);
  std::vector<Moments> result;
  for (int64_t c = 0; c < d.channels; ++c) {
    result.push_back(
        {mean[c], var[c], 0, static_cast<double>(found.low[c]), static_cast<double>(found.high[c]), finite});
  }
  return result;
}

// --------------------------------------------------------------------- range of the result

// The range of what will be quantized, and how many of its elements are not finite.
struct ActivationRange {
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  int64_t nonfinite = 0;
};

template <class T>
class RangeOfActivation {
 public:
  RangeOfActivation(const ClampSettings& clamp, NonFinite policy)
      : low_(static_cast<T>(clamp.low)), high_(static_cast<T>(clamp.high)), policy_(policy) {}

  T value(T x, const ChannelNorm<T>& norm) const {
    const Normalizer<Scalar<T>> n = {norm.mean, norm.gain, norm.bias};
    return clamped<Scalar<T>>(n.normalized(n.centred(x)), low_, high_);
  }

  // Adds a channel by its extremes. Returns false where they do not tell the range of the channel.
  bool add_extremes(const Moments& m, const ChannelNorm<T>& norm) {
    const T a = value(static_cast<T>(m.low), norm), b = value(static_cast<T>(m.high), norm);
    if (!m.finite || a - a != 0 || b - b != 0) return false;
    fold(a);
    fold(b);
    return true;
  }

  // Adds a channel's elements one by one.
  template <class S>
  void add_elements(const S* x, const Dense& d, int64_t channel, const ChannelNorm<T>& norm) {
    for (int64_t n = 0; n < d.outer; ++n) {
      const S* const row = x + (n * d.channels + channel) * d.inner;
      for (int64_t i = 0; i < d.inner; ++i) {
        const T e = value(to_compute(row[i]), norm);
        const bool is_finite = e - e == 0;
        range_.nonfinite += !is_finite;
        if (is_finite || policy_ == NonFinite::propagate) fold(e);
      }
    }
  }

  const ActivationRange& get() const { return range_; }

 private:
  // NaN stays.
  void fold(T e) {
    range_.low = least(static_cast<double>(e), range_.low);
    range_.high = greatest(static_cast<double>(e), range_.high);
  }

  T low_, high_;
  NonFinite policy_;
  ActivationRange range_;
};

template <class S, class T>
ActivationRange activation_range(const S* x, const Dense& d, const std::vector<Moments>& moments,
                                 const std::vector<ChannelNorm<T>>& norms, const ClampSettings& clamp,
                                 NonFinite policy) {
  RangeOfActivation<T> range(clamp, policy);
  for (int64_t c = 0; c < d.channels; ++c) {
    if (!range.add_extremes(moments[c], norms[c])) range.add_elements(x, d, c, norms[c]);
  }
  return range.get();
}

// -------------------------------------------------------------------------- norm in memory

// A reader of the norm tensor: rows of one value per channel.
template <class T>
struct NormRows {
  NormRows(const Array& norm, int64_t channels_) : rows(static_cast<const T*>(norm.data)), channels(channels_) {
    check_count(norm, 4 * channels);
    check(norm.type == (sizeof(T) == sizeof(double) ? Element::f64 : Element::f32),
          "norm must have the type that x is computed in");
  }

  ChannelNorm<T> at(int64_t c) const {
    return {rows[c], rows[channels + c], rows[2 * channels + c], rows[3 * channels + c]};
  }

  const T* rows;
  int64_t channels;
};

// What kernels of columns read of norms and, in training, of the terms that gradients subtract: once for each
// column of the widest chunks.
template <class T>
class ColumnNorms {
 public:
  ColumnNorms(const NormRows<T>& norm, const ColumnChunks& chunks, const GradientMeans<T>* means = nullptr)
      : width_(chunks.width()), has_means_(means != nullptr), values_((has_means_ ? 5 : 3) * width_) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      const ChannelNorm<T> n = norm.at(c);
      set(0, c, n.mean), set(1, c, n.gain), set(2, c, n.bias);
      ordinary_ &= is_ordinary(n.mean, n.gain, n.bias);
      if (has_means_) {
        set(3, c, means[c].offset), set(4, c, means[c].slope);
        ordinary_ &= is_ordinary(means[c].offset, T{1}, means[c].slope);
      }
    }
    for (int64_t row = 0; row < static_cast<int64_t>(values_.size()); row += width_) {
      T* const first = values_.data() + row;
      for (int64_t c = norm.channels; c < width_; ++c) first[c] = first[c - norm.channels];
    }
  }

  NormColumns<T> get() const {
    const T* const v = values_.data();
    return {v,
            v + width_,
            v + 2 * width_,
            has_means_ ? v + 3 * width_ : nullptr,
            has_means_ ? v + 4 * width_ : nullptr,
            ordinary_};
  }

 private:
  void set(int64_t row, int64_t c, T value) { values_[row * width_ + c] = value; }

  int64_t width_;
  bool has_means_, ordinary_ = true;
  std::vector<T> values_;
};

template <class T>
Activation<T> read_activation(const Array& quantizer, const ClampSettings& clamp, const QuantRange& range) {
  check_count(quantizer, 3);
  check(quantizer.type == Element::f64, "quantizer must have dtype float64");
  const auto* values = static_cast<const double*>(quantizer.data);
  check(!(values[0] <= 0), "the scale must be positive, got ", values[0]);
  return activation_of<Scalar<T>>(values, clamp.low, clamp.high, range.min, range.max);
}

// ---------------------------------------------------------------------------- gradients

template <class S>
struct GradientCall {
  using T = Compute<S>;
  const S *x, *grad;
  S* grad_x;
  Dense d;
  NormRows<T> norm;
  Range<T> passing;
  bool training;
  std::vector<double> of_bias, of_gain;
  std::vector<GradientMeans<T>> means;

  int64_t count() const { return d.outer * d.inner; }

  void add(int64_t c, const GradientSums& sums) {
    of_bias[c] += sums.of_bias;
    of_gain[c] += sums.of_gain;
  }

  // To be called when the sums of a channel are complete.
  void set_means(int64_t c) { means[c] = gradient_means(of_bias[c], of_gain[c], norm.at(c).invstd, count()); }
};

template <class S>
void gradient_of_chunk(const GradientCall<S>& call, const RowChunk& chunk) {
  const int64_t at = chunk.begin, c = chunk.channel;
  kernels_of(S{}).gradient_of_rows(call.grad + at, call.x + at, call.grad_x + at, chunk.shape, call.norm.at(c),
                                   call.passing, call.training ? &call.means[c] : nullptr);
}

// Few channels at a time, so that their gradients and elements are still in the L2 cache when they are read for
// the second time; where a channel is small, several, so that more memory is read in one go.
template <class S>
void backward_of_channels(GradientCall<S>* call, const RowChunks& chunks, int64_t pieces) {
  const auto& kernels = kernels_of(S{});
  constexpr int64_t kBytes = 200 * 1024;
  const int64_t of_channel = 2 * call->count() * static_cast<int64_t>(sizeof(S));
  const int64_t at_once = std::max<int64_t>(kBytes / of_channel, 1);
  for_pieces(call->d.channels, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += at_once) {
      const Range<int64_t> channels = {first, std::min(first + at_once, end)};
      chunks.of_channels<S>(channels, [&](const RowChunk& chunk) {
        const int64_t at = chunk.begin, c = chunk.channel;
        GradientSums sums = {0, 0};
        kernels.gradient_sums_of_rows(call->grad + at, call->x + at, chunk.shape, call->norm.at(c),
                                      call->passing, &sums);
        call->add(c, sums);
      });
      for (int64_t c = channels.low; c < channels.high; ++c) call->set_means(c);
      chunks.of_channels<S>(channels, [&](const RowChunk& chunk) { gradient_of_chunk(*call, chunk); });
    }
  });
}

// Where there are fewer channels than threads: all sums first.
template <class S>
void backward_of_chunks(GradientCall<S>* call, const RowChunks& chunks, int64_t pieces) {
  const auto& kernels = kernels_of(S{});
  std::vector<GradientSums> parts(chunks.count(), {0, 0});
  chunks.in_parallel<S>(pieces, [&](const RowChunk& c) {
    kernels.gradient_sums_of_rows(call->grad + c.begin, call->x + c.begin, c.shape, call->norm.at(c.channel),
                                  call->passing, &parts[c.index]);
  });
  chunks.each<S>([&](const RowChunk& c) { call->add(c.channel, parts[c.index]); });
  for (int64_t c = 0; c < call->d.channels; ++c) call->set_means(c);
  chunks.in_parallel<S>(pieces, [&](const RowChunk& chunk) { gradient_of_chunk(*call, chunk); });
}

template <class S>
void backward_of_columns(GradientCall<S>* call, int64_t pieces) {
  using T = Compute<S>;
  const auto& kernels = kernels_of(S{});
  const ColumnChunks chunks(call->d);
  const int64_t width = chunks.width();
  std::vector<double> parts(chunks.count() * width * 2, 0.0);
  const ColumnNorms<T> norms(call->norm, chunks);
  chunks.in_parallel(pieces, [&](int64_t i) {
    std::vector<T> scratch(column_scratch(width));
    const int64_t at = chunks.begin(i);
    double* const sums = &parts[i * width * 2];
    kernels.gradient_sums_of_columns(call->grad + at, call->x + at, chunks.rows(i), chunks.columns(i),
                                     norms.get(), call->passing, scratch.data(), sums, sums + width);
  });
  chunks.each_column([&](int64_t i, int64_t c, int64_t channel) {
    const double* const sums = &parts[i * width * 2];
    call->add(channel, {sums[c], sums[width + c]});
  });
  for (int64_t c = 0; c < call->d.channels; ++c) call->set_means(c);
  const ColumnNorms<T> with_means(call->norm, chunks, call->training ? call->means.data() : nullptr);
  chunks.in_parallel(pieces, [&](int64_t i) {
    const int64_t at = chunks.begin(i);
    kernels.gradient_of_columns(call->grad + at, call->x + at, call->grad_x + at, chunks.rows(i),
                                chunks.columns(i), with_means.get(), call->passing);
  });
}

}  // namespace

void observe_batch_norm(const Dense& x, const BatchNorm& bn, const ClampSettings& clamp,
                        const ObservedQuantizer& observed, void* norm, double* quantizer) {
  const FusedBuffers& buffers = observed.buffers;
  for (const Array* a : {&bn.weight, &bn.bias, &bn.running_mean, &bn.running_var}) check_count(*a, x.channels);
  for (const Array* a : {&buffers.min_val, &buffers.max_val, &buffers.scale, &buffers.zero_point})
    check_count(*a, 1);
  check(buffers.zero_point.type == Element::i32 || buffers.zero_point.type == Element::i64,
        "zero_point must have an integer dtype");
  check(observed.observes || !observed.quantizes || !(read_value<double>(buffers.scale) <= 0),
        "scale must be positive");
  const int64_t count = x.outer * x.inner;
  const bool of_batch = bn.training && x.numel() > 0, observes = observed.observes && x.numel() > 0;
  check(!of_batch || count > 1, "batch statistics need more than one value per channel");
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const S* const data = static_cast<const S*>(x.data);
    const std::vector<Moments> moments =
        of_batch ? moments_of(data, x) : running_moments(data, x, bn, observes);
    const std::vector<T> weight = read_values<T>(bn.weight), bias = read_values<T>(bn.bias);
    std::vector<ChannelNorm<T>> norms;
    for (int64_t c = 0; c < x.channels; ++c) {
      norms.push_back(channel_norm(moments[c].mean, moments[c].var, bn.eps, weight[c], bias[c]));
    }
    ActivationRange range;
    if (observes) {
      range = activation_range(data, x, moments, norms, clamp, observed.settings.nonfinite);
      if (observed.settings.nonfinite == NonFinite::raise && range.nonfinite > 0)
        throw NonfiniteElements(range.nonfinite);
      const bool counts = observed.settings.nonfinite == NonFinite::ignore;
      Extremes<double> current(1);
      current.low[0] = range.low;
      current.high[0] = range.high;
      const auto lock = locked(buffers.min_val);
      update_range(current, observed.settings.averaging_constant, buffers.min_val, buffers.max_val);
      add_nonfinite(buffers.nonfinite_count, counts ? range.nonfinite : 0);
    }
    if (observed.observes)
      choose_qparams(buffers.min_val, buffers.max_val, buffers.eps, observed.settings.qparams, buffers.scale,
                     buffers.zero_point);
    if (of_batch) {
      std::vector<double> mean = read_values<double>(bn.running_mean),
                          var = read_values<double>(bn.running_var);
      for (int64_t c = 0; c < x.channels; ++c) {
        mean[c] = moved_statistic(mean[c], moments[c].mean, bn.momentum);
        var[c] = moved_statistic(var[c], moments[c].unbiased_var, bn.momentum);
      }
      write_values(bn.running_mean, mean);
      write_values(bn.running_var, var);
    }
    T* const rows = static_cast<T*>(norm);
    for (int64_t c = 0; c < x.channels; ++c) {
      const T of_channel[] = {norms[c].mean, norms[c].invstd, norms[c].gain, norms[c].bias};
      for (int k = 0; k < 4; ++k) rows[k * x.channels + c] = of_channel[k];
    }
  });
  quantizer[0] = read_value<double>(buffers.scale);
  quantizer[1] = read_value<double>(buffers.zero_point);
  quantizer[2] = observed.quantizes ? 1 : 0;
}

void batch_norm_fake_quantize(const Dense& x, const Array& norm, const Array& quantizer,
                              const ClampSettings& clamp, const QuantRange& range, void* y) {
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    const auto& kernels = kernels_of(S{});
    const NormRows<T> norms(norm, x.channels);
    const Activation<T> activation = read_activation<T>(quantizer, clamp, range);
    if (x.numel() == 0) return;
    const S* const from = static_cast<const S*>(x.data);
    S* const to = static_cast<S*>(y);
    const int64_t pieces = piece_count(x.numel());
    if (has_columns(x)) {
      const ColumnChunks chunks(x);
      const ColumnNorms<T> columns(norms, chunks);
      chunks.in_parallel(pieces, [&](int64_t i) {
        const int64_t at = chunks.begin(i);
        kernels.normalize_columns(from + at, to + at, chunks.rows(i), chunks.columns(i), columns.get(),
                                  activation);
      });
      return;
    }
    const RowChunks chunks(x);
    chunks.in_parallel<S>(pieces, [&](const RowChunk& c) {
      kernels.normalize_rows(from + c.begin, to + c.begin, c.shape, norms.at(c.channel), activation);
    });
  });
}

void batch_norm_fake_quantize_backward(const Dense& x, const void* grad, const Array& norm,
                                       const Array& quantizer, bool training, const ClampSettings& clamp,
                                       const QuantRange& range, void* grad_x, const Array& grad_weight,
                                       const Array& grad_bias) {
  check_count(grad_weight, x.channels);
  check_count(grad_bias, x.channels);
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    using T = Compute<S>;
    GradientCall<S> call = {static_cast<const S*>(x.data),
                            static_cast<const S*>(grad),
                            static_cast<S*>(grad_x),
                            x,
                            NormRows<T>(norm, x.channels),
                            read_activation<T>(quantizer, clamp, range).passing,
                            training,
                            std::vector<double>(x.channels, 0.0),
                            std::vector<double>(x.channels, 0.0),
                            std::vector<GradientMeans<T>>(x.channels)};
    const int64_t pieces = piece_count(x.numel());
    if (x.numel() > 0) {
      if (has_columns(x)) {
        backward_of_columns(&call, pieces);
      } else if (const RowChunks chunks(x); x.channels >= pieces) {
        backward_of_channels(&call, chunks, pieces);
      } else {
        backward_of_chunks(&call, chunks, pieces);
      }
    }
    for (int64_t c = 0; c < x.channels; ++c) call.of_gain[c] *= static_cast<double>(call.norm.at(c).invstd);
    write_values(grad_weight, call.of_gain);
    write_values(grad_bias, call.of_bias);
  });
}

}  // namespace fastquant
