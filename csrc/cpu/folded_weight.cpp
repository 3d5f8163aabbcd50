// Weights folded with batch norm: which channel goes where, in parallel.
#include "folded_weight.h"

#include <type_traits>

#include "extremes.h"
#include "locks.h"
#include "statistics.h"
#include "vec_scalar.h"

namespace fastquant {
namespace {

// How many bytes of weights are observed and then quantized while they are in the L2 cache.
constexpr int64_t kBlock = 131072;

Array slice(const Array& a, int64_t begin, int64_t count) {
  const auto size = with_element(a.type, [](auto element) { return static_cast<int64_t>(sizeof element); });
  return {static_cast<char*>(a.data) + begin * size, a.type, count, a.name};
}

// Calls f(first element, number of elements) for each contiguous run of a channel's weights.
template <class F>
void for_rows(const Dense& weight, int64_t channel, const F& f) {
  for (int64_t o = 0; o < weight.outer; ++o) f((o * weight.channels + channel) * weight.inner, weight.inner);
}

int64_t channel_pieces(const Dense& weight) { return std::min(piece_count(weight.numel()), weight.channels); }

template <class T>
void check_fold(const Array& fold, const Dense& weight) {
  check(fold.type == (sizeof(T) == sizeof(float) ? Element::f32 : Element::f64), "fold has another dtype");
  check_count(fold, kFoldRows * weight.channels);
}

// The rows of the op's result `fold`.
template <class T>
class FoldRows {
 public:
  FoldRows(const Array& fold, int64_t channels) : data_(static_cast<T*>(fold.data)), channels_(channels) {}

  ChannelFold<T> get(int64_t c) const { return {at(0, c), at(1, c), at(2, c), at(3, c), at(4, c)}; }

  void set(int64_t c, const ChannelFold<T>& f) const {
    const T values[kFoldRows] = {f.s, f.bn_std, f.scale, f.inverse_scale, f.zero_point};
    for (int row = 0; row < kFoldRows; ++row) at(row, c) = values[row];
  }

 private:
  T& at(int64_t row, int64_t c) const { return data_[row * channels_ + c]; }

  T* data_;
  int64_t channels_;
};

template <class S, class F>
const FoldKernels<S, F, Compute<S>>& fold_kernels() {
  if constexpr (std::is_same_v<S, F>) {
    return kernels_of(S{}).fold;
  } else if constexpr (std::is_same_v<F, Half>) {
    return kernels().fold_to_f16;
  } else {
    return kernels().fold_to_bf16;
  }
}

// Calls f with values of the types of a weight and of the folded weight.
template <class F>
void with_weight_types(const Dense& weight, const Array& folded, const F& f) {
  check(folded.numel == weight.numel(), folded.name, " must have weight's shape");
  with_stored_type(weight.type, [&](auto stored) {
    if (folded.type == weight.type) return f(stored, stored);
    if constexpr (std::is_same_v<decltype(stored), float>) {
      if (folded.type == Element::f16) return f(stored, Half{});
      if (folded.type == Element::bf16) return f(stored, BFloat16{});
    }
    check(false, folded.name, " must have weight's dtype, or be narrower");
  });
}

// Writes n elements of one type as another.
template <class From, class To>
void convert(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) from_compute(to + i, static_cast<Compute<To>>(to_compute(from[i])));
}

template <class S, class F, class T>
void fold_channel(const Dense& weight, int64_t c, const ChannelFold<T>& fold, int64_t quant_min,
                  int64_t quant_max, F* folded) {
  const S* const from = static_cast<const S*>(weight.data);
  for_rows(weight, c, [&](int64_t begin, int64_t n) {
    if (fold.s == 0) {
      convert(from + begin, n, folded + begin);
    } else {
      fold_kernels<S, F>().forward(from + begin, folded + begin, n, fold, quant_min, quant_max);
    }
  });
}

// One call of observe_folded_weight.
template <class S, class Folded>
class Folding {
  using T = Compute<S>;
  using One = Scalar<T>;

 public:
  Folding(const Dense& weight, const Array& bn_weight, const Array& bn_std, const FusedBuffers& buffers,
          const ObserveSettings& settings)
      : weight_(weight),
        buffers_(buffers),
        settings_(settings),
        per_channel_(settings.ch_axis.has_value()),
        s_(read_values<T>(bn_weight)),
        stds_(read_values<T>(bn_std)) {
    for (int64_t c = 0; c < weight.channels; ++c) s_[c] = as_stored<S, One>(s_[c] / stds_[c]);
  }

  void run(bool observes, bool quantizes, Folded* folded, const Array& fold) {
    std::unique_lock<std::mutex> lock;
    std::vector<int64_t> left_out(std::max<int64_t>(channel_pieces(weight_), 1), 0);
    Extremes<T> current(weight_.channels);
    const auto find_extremes = [&](int64_t piece, int64_t begin, int64_t end) {
      left_out[piece] += product_extremes(begin, end, &current);
    };
    const auto count_left_out = [&] { return std::accumulate(left_out.begin(), left_out.end(), int64_t{0}); };
    if (observes) {
      lock = locked(buffers_.min_val);
      // Where all channels have one range, or some of them may forbid that any changes.
      if (!per_channel_ || settings_.nonfinite == NonFinite::raise) {
        for_channels(find_extremes);
        if (settings_.nonfinite == NonFinite::raise && count_left_out() > 0)
          throw NonfiniteElements(count_left_out());
      }
      if (!per_channel_) observe_all(current);
    }
    const bool found = settings_.nonfinite == NonFinite::raise;
    const FoldRows<T> rows(fold, weight_.channels);
    for_channels([&](int64_t piece, int64_t first, int64_t last) {
      const int64_t bytes = weight_.outer * weight_.inner * static_cast<int64_t>(sizeof(S));
      const int64_t block = std::max<int64_t>(kBlock / std::max<int64_t>(bytes, 1), 1);
      for (int64_t begin = first; begin < last; begin += block) {
        const int64_t end = std::min(begin + block, last);
        if (observes && per_channel_) {
          if (!found) find_extremes(piece, begin, end);
          observe_channels(current, begin, end);
        }
        quantize_channels(begin, end, quantizes, rows, folded);
      }
    });
    if (settings_.nonfinite == NonFinite::ignore) add_nonfinite(buffers_.nonfinite_count, count_left_out());
  }

 private:
  template <class F>
  void for_channels(const F& f) const {
    for_pieces(weight_.channels, channel_pieces(weight_), 1, f);
  }

  // The extremes of the products w s of the channels [begin, end), as far as the policy lets them take part.
  // Returns the number of the others.
  int64_t product_extremes(int64_t begin, int64_t end, Extremes<T>* result) const {
    if (weight_.numel() == 0) return 0;
    bool finite = true;
    for (int64_t c = begin; c < end; ++c) {
      T low = 0, high = 0;  // the products of a channel that batch norm multiplies by 0
      if (s_[c] != 0) {
        Extremes<T> of_weights(1);
        for_rows(weight_, c, [&](int64_t first, int64_t n) {
          bool nonfinite;
          kernels_of(S{}).minmax(static_cast<const S*>(weight_.data) + first, n, &low, &high, &nonfinite);
          of_weights.fold(0, low, high);
          finite &= !nonfinite;
        });
        // Multiplying and rounding are monotone.
        low = as_stored<S, One>(of_weights.low[0] * s_[c]);
        high = as_stored<S, One>(of_weights.high[0] * s_[c]);
        finite &= std::isfinite(low) && std::isfinite(high);
      }
      result->low[c] = std::min(low, high);
      result->high[c] = std::max(low, high);
    }
    return finite ? 0 : extremes_one_by_one(begin, end, result);
  }

  // The same where some product is NaN or infinite.
  int64_t extremes_one_by_one(int64_t begin, int64_t end, Extremes<T>* result) const {
    const int64_t each = weight_.outer * weight_.inner;
    std::vector<S> products(static_cast<size_t>((end - begin) * each));
    S* next = products.data();
    for (int64_t c = begin; c < end; ++c) {
      for_rows(weight_, c, [&](int64_t first, int64_t n) {
        for (const S* w = static_cast<const S*>(weight_.data) + first; n > 0; --n) {
          One::store(next++, s_[c] == 0 ? T{0} : One::load(w++) * s_[c]);
        }
      });
    }
    const Dense d = {products.data(), weight_.type, 1, end - begin, each};
    int64_t left_out;
    const auto policy = settings_.nonfinite == NonFinite::raise ? NonFinite::ignore : settings_.nonfinite;
    const auto found = observed_extremes<S, T>(products.data(), d, policy, &left_out);
    std::copy(found.low.begin(), found.low.end(), result->low.begin() + begin);
    std::copy(found.high.begin(), found.high.end(), result->high.begin() + begin);
    return left_out;
  }

  void observe_all(const Extremes<T>& channels) const {
    Extremes<T> all(1);
    for (int64_t c = 0; c < weight_.channels; ++c) {
      all.low[0] = least(channels.low[c], all.low[0]);
      all.high[0] = greatest(channels.high[c], all.high[0]);
    }
    update(all, buffers_);
  }

  void observe_channels(const Extremes<T>& channels, int64_t begin, int64_t end) const {
    Extremes<T> some(end - begin);
    std::copy(channels.low.begin() + begin, channels.low.begin() + end, some.low.begin());
    std::copy(channels.high.begin() + begin, channels.high.begin() + end, some.high.begin());
    FusedBuffers b = buffers_;
    for (Array* a : {&b.min_val, &b.max_val, &b.scale, &b.zero_point}) *a = slice(*a, begin, end - begin);
    update(some, b);
  }

  void update(const Extremes<T>& extremes, const FusedBuffers& b) const {
    update_range(extremes, settings_.averaging_constant, b.min_val, b.max_val);
    choose_qparams(b.min_val, b.max_val, b.eps, settings_.qparams, b.scale, b.zero_point);
  }

  void quantize_channels(int64_t begin, int64_t end, bool quantizes, const FoldRows<T>& rows,
                         Folded* folded) const {
    const int64_t first = per_channel_ ? begin : 0, count = per_channel_ ? end - begin : 1;
    const auto scales = read_values<T>(slice(buffers_.scale, first, count));
    const auto zero_points = read_values<T>(slice(buffers_.zero_point, first, count));
    const bool double_scale = buffers_.scale.type == Element::f64;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = per_channel_ ? c - begin : 0;
      const ChannelFold<T> fold = {quantizes ? s_[c] : T{0}, stds_[c], scales[i],
                                   reciprocal(scales[i], double_scale), zero_points[i]};
      rows.set(c, fold);
      fold_channel<S>(weight_, c, fold, settings_.qparams.quant_min, settings_.qparams.quant_max, folded);
    }
  }

  const Dense& weight_;
  const FusedBuffers& buffers_;
  const ObserveSettings& settings_;
  bool per_channel_;
  std::vector<T> s_, stds_;
};

}  // namespace

void observe_folded_weight(const Dense& weight, const Array& bn_weight, const Array& bn_std,
                           const FusedBuffers& buffers, const ObserveSettings& settings, bool observes,
                           bool quantizes, const Array& folded, const Array& fold) {
  for (const Array* a : {&bn_weight, &bn_std}) {
    check_count(*a, weight.channels);
    check(a->type == weight.type, a->name, " must have weight's dtype");
  }
  const int64_t ranges = settings.ch_axis.has_value() ? weight.channels : 1;
  for (const Array* a : {&buffers.min_val, &buffers.max_val, &buffers.scale, &buffers.zero_point})
    check_count(*a, ranges);
  const Element type = buffers.zero_point.type;
  check(type == Element::i32 || type == Element::i64, "zero_point must have an integer dtype");
  with_weight_types(weight, folded, [&](auto stored, auto narrow) {
    using S = decltype(stored);
    using F = decltype(narrow);
    check_fold<Compute<S>>(fold, weight);
    Folding<S, F> folding(weight, bn_weight, bn_std, buffers, settings);
    folding.run(observes, quantizes, static_cast<F*>(folded.data), fold);
  });
}

void fold_weight(const Dense& weight, const Array& fold, int64_t quant_min, int64_t quant_max,
                 const Array& folded) {
  with_weight_types(weight, folded, [&](auto stored, auto narrow) {
    using S = decltype(stored);
    using F = decltype(narrow);
    check_fold<Compute<S>>(fold, weight);
    const FoldRows<Compute<S>> rows(fold, weight.channels);
    for_pieces(weight.channels, channel_pieces(weight), 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        fold_channel<S>(weight, c, rows.get(c), quant_min, quant_max, static_cast<F*>(folded.data));
    });
  });
}

void fold_weight_backward(const Dense& weight, const Array& grad, const Array& fold, int64_t quant_min,
                          int64_t quant_max, void* grad_weight, const Array& grad_bn_weight) {
  check_count(grad_bn_weight, weight.channels);
  std::vector<double> gradients(static_cast<size_t>(weight.channels), 0.0);
  with_weight_types(weight, grad, [&](auto stored, auto narrow) {
    using S = decltype(stored);
    using F = decltype(narrow);
    check_fold<Compute<S>>(fold, weight);
    const FoldRows<Compute<S>> rows(fold, weight.channels);
    const F* const g = static_cast<const F*>(grad.data);
    const S* const w = static_cast<const S*>(weight.data);
    S* const out = static_cast<S*>(grad_weight);
    for_pieces(weight.channels, channel_pieces(weight), 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const auto f = rows.get(c);
        double total = 0;
        for_rows(weight, c, [&](int64_t begin, int64_t n) {
          if (f.s != 0) {
            total +=
                fold_kernels<S, F>().backward(g + begin, w + begin, out + begin, n, f, quant_min, quant_max);
          } else {
            convert(g + begin, n, out + begin);
          }
        });
        if (f.s != 0) gradients[c] = total / static_cast<double>(f.s) / static_cast<double>(f.bn_std);
      }
    });
  });
  write_values(grad_bn_weight, gradients);
}

}  // namespace fastquant
