// Kernels for batch norm with an activation and fake-quantize where channels are the columns of a matrix:
// moments of channels, the forward pass, gradients.
#pragma once

#include "batch_norm-inl.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// Pairs of vectors with the interface of one vector, whose elements are in the order of load_pair for BFloat16.
// For them, loading and storing a pair takes fewer instructions than two vectors do.
template <class V>
struct Pair {
  static constexpr int N = 2 * V::N;
  using Element = typename V::Element;
  struct Reg {
    typename V::Reg a, b;
  };
  struct Mask {
    typename V::Mask a, b;
  };

  static Reg set1(Element x) { return {V::set1(x), V::set1(x)}; }
  static Reg load(const BFloat16* p) {
    Reg x;
    V::load_pair(p, &x.a, &x.b);
    return x;
  }
  static void store(BFloat16* p, const Reg& x) { V::store_pair_normal(p, x.a, x.b); }
  static Reg load(const Element* p) {
    const auto low = V::load(p), high = V::load(p + V::N);
    if constexpr (V::kAlternates) return {V::even(low, high), V::odd(low, high)};
    return {low, high};
  }
  static void store(Element* p, Reg x) {
    in_order<V, BFloat16>(&x.a, &x.b);
    V::store(p, x.a), V::store(p + V::N, x.b);
  }
  static Reg add(const Reg& x, const Reg& y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static Reg sub(const Reg& x, const Reg& y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static Reg mul(const Reg& x, const Reg& y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
  static Reg min(const Reg& x, const Reg& y) { return {V::min(x.a, y.a), V::min(x.b, y.b)}; }
  static Reg max(const Reg& x, const Reg& y) { return {V::max(x.a, y.a), V::max(x.b, y.b)}; }
  static Mask not_lt(const Reg& x, const Reg& y) { return {V::not_lt(x.a, y.a), V::not_lt(x.b, y.b)}; }
  static Mask unordered(const Reg& x, const Reg& y) { return {V::unordered(x.a, y.a), V::unordered(x.b, y.b)}; }
  static Mask both(const Mask& m, const Mask& n) { return {V::both(m.a, n.a), V::both(m.b, n.b)}; }
  static Reg select(const Mask& m, const Reg& yes, const Reg& no) {
    return {V::select(m.a, yes.a, no.a), V::select(m.b, yes.b, no.b)};
  }
};

// The vectors that cover the columns of a matrix; the last one may overlap the one before. Accumulators have a
// vector of their own for each, so that nothing is added twice.
template <class V>
struct ColumnVectors {
  using Vector = V;
  int64_t columns;

  int64_t slots() const { return (columns + V::N - 1) / V::N * V::N; }

  // The first column of the vector of a slot.
  int64_t column(int64_t slot) const { return smaller(slot, columns - V::N); }

  // The slot of a column.
  int64_t slot_of(int64_t c) const {
    const int64_t last = columns / V::N * V::N;
    return c < last ? c : last + c - (columns - V::N);
  }
};

// Rows whose sums are taken in T before they are added to a double.
constexpr int64_t kSummedRows = 32;

// Vectors side by side whose parameters and sums fit in registers.
template <class V>
constexpr int kMostVectors = 4;
template <class V>
constexpr int kMostVectors<Pair<V>> = 2;

template <int kMost, class F>
void with_count(int64_t count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Calls f(count, slot) for blocks of vectors; count has the number of vectors, at most kMostVectors, in its
// type.
template <class V, class F>
void for_blocks(const ColumnVectors<V>& vectors, const F& f) {
  int64_t slot = 0;
  for (int64_t left = vectors.slots() / V::N; left > 0;) {
    const int64_t blocks = (left + kMostVectors<V> - 1) / kMostVectors<V>, count = (left + blocks - 1) / blocks;
    with_count<kMostVectors<V>>(count, [&](auto n) { f(n, slot); });
    slot += count * V::N;
    left -= count;
  }
}

// The vectors of neighbouring slots, of which p is the first.
template <class V, int kCount, class T>
void load_slots(const T* p, typename V::Reg (&to)[kCount]) {
  for (int k = 0; k < kCount; ++k) to[k] = V::load(p + k * V::N);
}

template <class V, int kCount, class T>
void store_slots(const typename V::Reg (&from)[kCount], T* p) {
  for (int k = 0; k < kCount; ++k) V::store(p + k * V::N, from[k]);
}

// Rows of S of which one block of columns is worked on after the other, so few that all tensors' rows stay in
// the L1 cache until the last block. They divide kSummedRows.
template <class S>
class RowGroups {
 public:
  explicit RowGroups(int64_t columns) : bytes_of_row_(columns * static_cast<int64_t>(sizeof(S))) {
    constexpr int64_t kBytes = 4096;
    while (at_once_ > 1 && at_once_ * bytes_of_row_ > kBytes) at_once_ /= 2;
  }

  // How far ahead rows are fetched by kernels that only read, and by those that also write: the L1 cache has to
  // hold the rows of all tensors.
  int64_t ahead_of_reads() const { return 4 * at_once_ * bytes_of_row_; }
  int64_t ahead_of_writes() const { return 2 * at_once_ * bytes_of_row_; }

  // Calls f(begin, end) for the rows of each group.
  template <class F>
  void each(int64_t rows, const F& f) const {
    for (int64_t r = 0; r < rows; r += at_once_) f(r, smaller(r + at_once_, rows));
  }

 private:
  int64_t bytes_of_row_, at_once_ = kSummedRows;
};

// Calls f with a vector type for elements of S that is no wider than the matrix.
template <class V, class S, class F>
void with_columns(int64_t columns, const F& f) {
  if constexpr (std::is_same_v<S, BFloat16> && V::N > 1) {
    if (columns >= Pair<V>::N) return f(ColumnVectors<Pair<V>>{columns});
  }
  if (columns < V::N) {
    f(ColumnVectors<Scalar<typename V::Element>>{columns});
  } else {
    f(ColumnVectors<V>{columns});
  }
}

// Adds the sums in T to those in double, and sets them to zero.
template <class V, class T>
void flush_columns(const ColumnVectors<V>& vectors, T* sums, double* totals) {
  const int64_t overlap = vectors.slots() - vectors.columns, last = vectors.slots() - V::N;
  for (int64_t c = 0; c < last; ++c) totals[c] += static_cast<double>(sums[c]);
  for (int64_t c = last; c < vectors.columns; ++c) totals[c] += static_cast<double>(sums[c + overlap]);
  for (int64_t i = 0; i < vectors.slots(); ++i) sums[i] = 0;
}

// The mean of some rows.
template <class V, class S, class T>
void mean_of_rows(const ColumnVectors<V>& vectors, const S* x, int64_t rows, T* mean) {
  const int64_t slots = vectors.slots();
  for (int64_t i = 0; i < slots; ++i) mean[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t slot = 0; slot < slots; slot += V::N) {
      const auto e = V::load(x + r * vectors.columns + vectors.column(slot));
      V::store(mean + slot, V::add(V::load(mean + slot), e));
    }
  }
  for (int64_t i = 0; i < slots; ++i) mean[i] /= static_cast<T>(rows);
}

// See MomentSums. Here, the centre of a column is the mean of its first rows.
template <class V, class S, class T>
void moments_of_vectors(const ColumnVectors<V>& vectors, const S* x, int64_t rows, T* scratch, double* totals,
                        ChunkMoments* out) {
  const int64_t columns = vectors.columns, slots = vectors.slots();
  T *const centre = scratch, *const distance = centre + slots, *const square = distance + slots;
  T *const lows = square + slots, *const highs = lows + slots;
  double *const distances = totals, *const squares = totals + columns;
  for (int64_t i = 0; i < slots; ++i) {
    distance[i] = square[i] = 0;
    lows[i] = infinity<T>(), highs[i] = -infinity<T>();
  }
  for (int64_t c = 0; c < 2 * columns; ++c) totals[c] = 0;
  mean_of_rows(vectors, x, smaller(rows, kSummedRows), centre);
  const RowGroups<S> groups(columns);
  const int64_t ahead = groups.ahead_of_reads();
  groups.each(rows, [&](int64_t begin, int64_t end) {
    for_blocks(vectors, [&](auto count, int64_t slot) {
      constexpr int kCount = decltype(count)::value;
      typename V::Reg about[kCount], sum[kCount], squares_sum[kCount], low[kCount], high[kCount];
      load_slots<V>(centre + slot, about);
      load_slots<V>(distance + slot, sum), load_slots<V>(square + slot, squares_sum);
      load_slots<V>(lows + slot, low), load_slots<V>(highs + slot, high);
      const S* column[kCount];
      for (int k = 0; k < kCount; ++k) column[k] = x + vectors.column(slot + k * V::N);
      for (int64_t r = begin; r < end; ++r) {
        for (int k = 0; k < kCount; ++k) {
          const S* const p = column[k] + r * columns;
          fetch_ahead<V::N>(p, ahead);
          const auto e = V::load(p);
          const auto d = V::sub(e, about[k]);
          sum[k] = V::add(sum[k], d);
          squares_sum[k] = V::add(squares_sum[k], V::mul(d, d));
          low[k] = V::min(e, low[k]);
          high[k] = V::max(e, high[k]);
        }
      }
      store_slots<V>(sum, distance + slot), store_slots<V>(squares_sum, square + slot);
      store_slots<V>(low, lows + slot), store_slots<V>(high, highs + slot);
    });
    if (end % kSummedRows == 0 || end == rows) {
      flush_columns(vectors, distance, distances);
      flush_columns(vectors, square, squares);
    }
  });
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t slot = vectors.slot_of(c);
    const MomentsAbout<T> about = {centre[slot], distances[c], squares[c], lows[slot], highs[slot]};
    out[c] = about.moments(rows);
    if (!out[c].finite) out[c] = moments_one_by_one<S, T>(x + c, rows, columns);
  }
}

template <class V, class S, class T>
void moments_of_columns(const S* x, int64_t rows, int64_t columns, T* scratch, double* totals,
                        ChunkMoments* out) {
  // No pairs: it would take longer to put their five accumulators in order than loading pairs saves.
  with_columns<V, T>(columns,
                     [&](const auto& vectors) { moments_of_vectors(vectors, x, rows, scratch, totals, out); });
}

template <class V, class T>
Normalizer<V> normalizer_at(const NormColumns<T>& norm, int64_t c) {
  return {V::load(norm.mean + c), V::load(norm.gain + c), V::load(norm.bias + c)};
}

// kCount vectors of columns side by side, from a slot on, and what normalizes them.
template <class V, int kCount>
struct NormedColumns {
  int64_t column[kCount];
  Normalizer<V> normalizer[kCount];

  template <class T>
  NormedColumns(const ColumnVectors<V>& vectors, int64_t slot, const NormColumns<T>& norm) {
    for (int k = 0; k < kCount; ++k) {
      column[k] = vectors.column(slot + k * V::N);
      normalizer[k] = normalizer_at<V>(norm, column[k]);
    }
  }
};

template <bool kSameNan, class Way, class S, class T>
void normalize_columns_by(const S* x, S* y, int64_t rows, int64_t columns, const NormColumns<T>& norm,
                          const Way& way) {
  using V = typename Way::Vector;
  const ColumnVectors<V> vectors = {columns};
  const RowGroups<S> groups(columns);
  const int64_t ahead = groups.ahead_of_writes();
  groups.each(rows, [&](int64_t begin, int64_t end) {
    for_blocks(vectors, [&](auto count, int64_t slot) {
      constexpr int kCount = decltype(count)::value;
      const NormedColumns<V, kCount> normed(vectors, slot, norm);
      for (int64_t r = begin; r < end; ++r) {
        for (int k = 0; k < kCount; ++k) {
          const int64_t i = r * columns + normed.column[k];
          fetch_ahead<V::N>(x + i, ahead);
          fetch_ahead<V::N>(y + i, ahead);
          const auto& n = normed.normalizer[k];
          V::store(y + i, same_nan<V, kSameNan>(way(n.normalized(n.centred(V::load(x + i))))));
        }
      }
    });
  });
}

template <class V, class S, class T>
void normalize_columns(const S* x, S* y, int64_t rows, int64_t columns, const NormColumns<T>& norm,
                       const Activation<T>& activation) {
  with_columns<V, S>(columns, [&](auto vectors) {
    with_way<typename decltype(vectors)::Vector>(activation, [&](const auto& way) {
      if (norm.ordinary) {
        normalize_columns_by<false>(x, y, rows, columns, norm, way);
      } else {
        normalize_columns_by<true>(x, y, rows, columns, norm, way);
      }
    });
  });
}

template <class V, class S, class T>
void gradient_sums_of_vectors(const ColumnVectors<V>& vectors, const S* grad, const S* x, int64_t rows,
                              const NormColumns<T>& norm, const Range<T>& range, T* scratch, double* of_bias,
                              double* of_gain) {
  const int64_t columns = vectors.columns, slots = vectors.slots();
  T *const bias_sums = scratch, *const gain_sums = scratch + slots;
  for (int64_t i = 0; i < 2 * slots; ++i) scratch[i] = 0;
  const auto gradients = gradients_of<V>(range);
  const RowGroups<S> groups(columns);
  const int64_t ahead = groups.ahead_of_reads();
  groups.each(rows, [&](int64_t begin, int64_t end) {
    for_blocks(vectors, [&](auto count, int64_t slot) {
      constexpr int kCount = decltype(count)::value;
      const NormedColumns<V, kCount> normed(vectors, slot, norm);
      typename V::Reg bias_sum[kCount], gain_sum[kCount];
      load_slots<V>(bias_sums + slot, bias_sum), load_slots<V>(gain_sums + slot, gain_sum);
      for (int64_t r = begin; r < end; ++r) {
        for (int k = 0; k < kCount; ++k) {
          const int64_t i = r * columns + normed.column[k];
          fetch_ahead<V::N>(grad + i, ahead);
          fetch_ahead<V::N>(x + i, ahead);
          const auto& n = normed.normalizer[k];
          const auto centred = n.centred(V::load(x + i));
          const auto passed = gradients.passed(V::load(grad + i), n.normalized(centred));
          bias_sum[k] = V::add(bias_sum[k], passed);
          gain_sum[k] = V::add(gain_sum[k], V::mul(passed, centred));
        }
      }
      store_slots<V>(bias_sum, bias_sums + slot), store_slots<V>(gain_sum, gain_sums + slot);
    });
    if (end % kSummedRows == 0 || end == rows) {
      flush_columns(vectors, bias_sums, of_bias);
      flush_columns(vectors, gain_sums, of_gain);
    }
  });
}

template <class V, class S, class T>
void gradient_sums_of_columns(const S* grad, const S* x, int64_t rows, int64_t columns,
                              const NormColumns<T>& norm, const Range<T>& range, T* scratch, double* of_bias,
                              double* of_gain) {
  with_columns<V, S>(columns, [&](const auto& vectors) {
    gradient_sums_of_vectors(vectors, grad, x, rows, norm, range, scratch, of_bias, of_gain);
  });
}

template <bool kSameNan, bool kTraining, class V, class S, class T>
void gradient_of_vectors(const ColumnVectors<V>& vectors, const S* grad, const S* x, S* grad_x, int64_t rows,
                         const NormColumns<T>& norm, const Range<T>& range) {
  const int64_t columns = vectors.columns;
  const auto gradients = gradients_of<V>(range);
  // The last vector of a row is read first where it overlaps the one before: grad_x may be grad.
  S last[kSummedRows][V::N] = {};
  const int64_t last_column = columns - V::N;
  const bool overlaps = columns % V::N != 0;
  const RowGroups<S> groups(columns);
  const int64_t ahead = groups.ahead_of_writes();
  groups.each(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; overlaps && r < end; ++r) {
      copy_elements<V::N>(grad + r * columns + last_column, last[r - begin]);
    }
    for_blocks(vectors, [&](auto count, int64_t slot) {
      constexpr int kCount = decltype(count)::value;
      const NormedColumns<V, kCount> normed(vectors, slot, norm);
      typename V::Reg offset[kCount], slope[kCount];
      for (int k = 0; kTraining && k < kCount; ++k) {
        offset[k] = V::load(norm.offset + normed.column[k]);
        slope[k] = V::load(norm.slope + normed.column[k]);
      }
      for (int64_t r = begin; r < end; ++r) {
        for (int k = 0; k < kCount; ++k) {
          const int64_t i = r * columns + normed.column[k];
          fetch_ahead<V::N>(grad + i, ahead);
          fetch_ahead<V::N>(x + i, ahead);
          fetch_ahead<V::N>(grad_x + i, ahead);
          const auto& n = normed.normalizer[k];
          const bool is_whole = slot + k * V::N == normed.column[k];
          const auto centred = n.centred(V::load(x + i));
          auto of_x = gradients.passed(V::load(is_whole ? grad + i : last[r - begin]), n.normalized(centred));
          if constexpr (kTraining) {
            of_x = gradient_of_x<V>(of_x, centred, n.gain, offset[k], slope[k]);
          } else {
            of_x = V::mul(n.gain, of_x);
          }
          V::store(grad_x + i, same_nan<V, kSameNan>(of_x));
        }
      }
    });
  });
}

template <class V, class S, class T>
void gradient_of_columns(const S* grad, const S* x, S* grad_x, int64_t rows, int64_t columns,
                         const NormColumns<T>& norm, const Range<T>& range) {
  with_columns<V, S>(columns, [&](const auto& vectors) {
    if (norm.offset == nullptr) {
      if (norm.ordinary) {
        gradient_of_vectors<false, false>(vectors, grad, x, grad_x, rows, norm, range);
      } else {
        gradient_of_vectors<true, false>(vectors, grad, x, grad_x, rows, norm, range);
      }
    } else if (norm.ordinary) {
      gradient_of_vectors<false, true>(vectors, grad, x, grad_x, rows, norm, range);
    } else {
      gradient_of_vectors<true, true>(vectors, grad, x, grad_x, rows, norm, range);
    }
  });
}

}  // namespace
}  // namespace fastquant
