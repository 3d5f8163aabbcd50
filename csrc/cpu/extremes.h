// The smallest and largest elements of each channel of a tensor, computed in parallel, and the ranges that are
// updated with them.
#pragma once

#include <numeric>

#include "arrays.h"

namespace fastquant {
namespace {

// The smallest and largest element of each channel. low > high if no element of a channel was taken. Threads
// write to neighbours in an array, so each has cache lines of its own.
template <class T>
struct alignas(64) Extremes {
  explicit Extremes(int64_t channels)
      : low(channels, std::numeric_limits<T>::infinity()),
        high(channels, -std::numeric_limits<T>::infinity()) {}

  void fold(int64_t channel, T lo, T hi) {
    low[channel] = std::min(low[channel], lo);
    high[channel] = std::max(high[channel], hi);
  }

  FewOrMany<T> low, high;
};

// A row is `inner` contiguous elements of one channel. Rows of at least this length are reduced one by one.
constexpr int64_t kShortRow = 512;

template <class S, class T>
bool extremes_of_rows(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax = kernels_of(S{}).minmax;
  const int64_t n = d.numel();
  const int64_t pieces = piece_count(n);
  // Returns whether there were NaN or infinities. It says so once, since the flags of several threads share a
  // cache line.
  const auto fold_piece = [&](int64_t begin, int64_t end, Extremes<T>* into) {
    bool nonfinite = false;
    for_segments(d, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      T lo, hi;
      bool nonfinite_here;
      minmax(x + from, to - from, &lo, &hi, &nonfinite_here);
      into->fold(channel, lo, hi);
      nonfinite |= nonfinite_here;
    });
    return nonfinite;
  };
  // Writes to `result` directly: for a small tensor, allocating partial results would take as long as reading
  // it.
  if (pieces == 1) return n > 0 && fold_piece(0, n, result);
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(d.channels));
  std::vector<char> nonfinite(pieces, 0);
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    nonfinite[piece] = fold_piece(begin, end, &partial[piece]);
  });
  for (const auto& p : partial) {
    for (int64_t c = 0; c < d.channels; ++c) result->fold(c, p.low[c], p.high[c]);
  }
  return std::any_of(nonfinite.begin(), nonfinite.end(), [](char found) { return found != 0; });
}

// Reduces the extremes of each column of a matrix with rows of shape [repeat, channels, inner] to those of each
// channel.
template <class T>
void fold_columns(const Extremes<T>& columns, int64_t repeat, const Dense& d, Extremes<T>* result) {
  const auto& kernels = kernels_of(T{});
  const int64_t width = d.channels * d.inner;
  bool found;
  if (repeat > 1) {
    Extremes<T> once(width), unused(width);
    kernels.minmax_columns(columns.low.data(), repeat, width, width, once.low.data(), unused.high.data(),
                           &found);
    kernels.minmax_columns(columns.high.data(), repeat, width, width, unused.low.data(), once.high.data(),
                           &found);
    fold_columns(once, 1, d, result);
    return;
  }
  for (int64_t c = 0; c < d.channels; ++c) {
    T low = columns.low[c], high = columns.high[c], other;
    if (d.inner > 1) {
      kernels.minmax(&columns.low[c * d.inner], d.inner, &low, &other, &found);
      kernels.minmax(&columns.high[c * d.inner], d.inner, &other, &high, &found);
    }
    result->fold(c, low, high);
  }
}

// How many indices of the outer dimension to combine into one row of the matrix, so that its columns fill whole
// vectors. 1 if such a row would be too long.
inline int64_t side_by_side(int64_t width) {
  constexpr int64_t kMost = 1024;
  for (const int64_t elements : {64, 16}) {
    const int64_t steps = elements / std::gcd(elements, width);
    if (steps * width <= kMost) return steps;
  }
  return 1;
}

// For short rows: treats the tensor as a matrix with one column for each position in [channels, inner], and
// reduces the columns.
template <class S, class T>
bool extremes_of_columns(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax_columns = kernels_of(S{}).minmax_columns;
  const int64_t width = d.channels * d.inner;
  const int64_t repeat = std::min(d.outer, side_by_side(width));
  const int64_t columns = width * repeat;
  const int64_t rows = d.outer / repeat;
  const int64_t pieces = std::min(piece_count(d.numel()), std::max<int64_t>(rows, 1));
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(columns));
  std::vector<char> nonfinite(pieces, 0);
  for_pieces(rows, pieces, 1, [&](int64_t piece, int64_t begin, int64_t end) {
    bool found = false;
    auto& p = partial[piece];
    minmax_columns(x + begin * columns, end - begin, columns, columns, p.low.data(), p.high.data(), &found);
    nonfinite[piece] = found;
  });
  bool found = false;
  auto& first = partial[0];
  minmax_columns(x + rows * columns, 1, (d.outer - rows * repeat) * width, columns, first.low.data(),
                 first.high.data(), &found);
  for (const auto& p : partial) fold_columns(p, repeat, d, result);
  return found || std::any_of(nonfinite.begin(), nonfinite.end(), [](char f) { return f != 0; });
}

// Computes the extremes of all elements except NaN. Returns whether there were NaN or infinities.
template <class S, class T>
bool extremes(const S* x, const Dense& d, Extremes<T>* result) {
  return d.outer == 1 || d.inner >= kShortRow ? extremes_of_rows(x, d, result)
                                              : extremes_of_columns(x, d, result);
}

// Computes the extremes of the finite elements of a tensor that has NaN or infinities. Returns the number of
// elements that are not finite.
template <class S, class T>
int64_t finite_extremes(const S* x, const Dense& d, Extremes<T>* result) {
  const auto minmax_finite = kernels_of(S{}).minmax_finite;
  const int64_t n = d.numel();
  const int64_t pieces = piece_count(n);
  std::vector<Extremes<T>> partial(pieces, Extremes<T>(d.channels));
  std::vector<int64_t> counts(pieces, 0);
  for_pieces(n, pieces, 64, [&](int64_t piece, int64_t begin, int64_t end) {
    int64_t left_out = 0;
    for_segments(d, begin, end, [&](int64_t channel, int64_t from, int64_t to) {
      T lo, hi;
      int64_t count;
      minmax_finite(x + from, to - from, &lo, &hi, &count);
      partial[piece].fold(channel, lo, hi);
      left_out += count;
    });
    counts[piece] = left_out;
  });
  for (const auto& p : partial) {
    for (int64_t c = 0; c < d.channels; ++c) result->fold(c, p.low[c], p.high[c]);
  }
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  return total;
}

// Sets the extremes of each channel that has a NaN to NaN, as torch.aminmax does.
template <class S, class T>
void propagate_nan(const S* x, const Dense& d, Extremes<T>* result) {
  for_segments(d, 0, d.numel(), [&](int64_t channel, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (std::isnan(to_compute(x[i]))) {
        result->low[channel] = result->high[channel] = std::numeric_limits<T>::quiet_NaN();
        return;
      }
    }
  });
}

// The extremes of the elements that the policy lets take part. *left_out is set to the number of the others.
// Under NonFinite::raise, throws if there are any.
template <class S, class T>
Extremes<T> observed_extremes(const S* x, const Dense& d, NonFinite policy, int64_t* left_out) {
  Extremes<T> result(d.channels);
  *left_out = 0;
  if (!extremes(x, d, &result)) return result;
  if (policy == NonFinite::propagate) {
    propagate_nan(x, d, &result);
    return result;
  }
  Extremes<T> finite(d.channels);
  *left_out = finite_extremes(x, d, &finite);
  if (policy == NonFinite::raise) throw NonfiniteElements(*left_out);
  return finite;
}

// Updates min_val and max_val from a tensor's extremes. B is the type of the buffers' arithmetic.
template <class B, class T>
void update_buffers(const Extremes<T>& current, std::optional<double> averaging_constant, const Array& min_val,
                    const Array& max_val) {
  const B constant = static_cast<B>(averaging_constant.value_or(0.0));
  using Values = FewOrMany<B>;
  auto lows = read_values<B, Values>(min_val), highs = read_values<B, Values>(max_val);
  for (int64_t c = 0; c < lows.size(); ++c) {
    if (current.low[c] > current.high[c]) continue;
    const B low = static_cast<B>(rounded_to(min_val.type, current.low[c]));
    const B high = static_cast<B>(rounded_to(max_val.type, current.high[c]));
    const auto moved = folded<B>({lows[c], highs[c]}, {low, high}, averaging_constant.has_value(), constant);
    lows[c] = moved.low;
    highs[c] = moved.high;
  }
  write_values(min_val, lows);
  write_values(max_val, highs);
}

// The same in the precision of the buffers.
template <class T>
void update_range(const Extremes<T>& current, std::optional<double> averaging_constant, const Array& min_val,
                  const Array& max_val) {
  if (min_val.type == Element::f64) {
    update_buffers<double>(current, averaging_constant, min_val, max_val);
  } else {
    update_buffers<float>(current, averaging_constant, min_val, max_val);
  }
}

}  // namespace
}  // namespace fastquant
