// Kernels for the smallest and largest element.
#pragma once

#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"
#include "sources-inl.h"

namespace fastquant {
namespace {

template <class T>
bool is_finite_range(T low, T high) {
  return low >= -largest<T>() && high <= largest<T>();
}

template <class V, class Source, class T>
void minmax_of(const Source& x, int64_t n, T* low, T* high, bool* nonfinite) {
  constexpr int N = V::N;
  T lo = infinity<T>();
  T hi = -infinity<T>();
  bool nan = false;
  if (n < N) {
    using One = Scalar<T>;
    for (int64_t i = 0; i < n; ++i) {
      const T e = x.template load<One>(i);
      nan |= One::unordered(e, e);
      lo = One::min(e, lo);
      hi = One::max(e, hi);
    }
  } else {
    // Four independent accumulators hide the latency of min and max.
    auto lo0 = V::set1(lo), lo1 = lo0, lo2 = lo0, lo3 = lo0;
    auto hi0 = V::set1(hi), hi1 = hi0, hi2 = hi0, hi3 = hi0;
    auto nans = V::none();
    int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N) {
      x.template fetch<4 * N>(i);
      typename V::Reg a, b, c, d;
      x.template load_pair<V>(i, &a, &b);
      x.template load_pair<V>(i + 2 * N, &c, &d);
      // min and max ignore NaN, so it is detected separately: one comparison checks two vectors.
      nans = V::either(nans, V::either(V::unordered(a, b), V::unordered(c, d)));
      lo0 = V::min(a, lo0);
      hi0 = V::max(a, hi0);
      lo1 = V::min(b, lo1);
      hi1 = V::max(b, hi1);
      lo2 = V::min(c, lo2);
      hi2 = V::max(c, hi2);
      lo3 = V::min(d, lo3);
      hi3 = V::max(d, hi3);
    }
    for (; i < n; i += N) {
      // The last vector may overlap the one before. Reducing an element twice does not change the result.
      const auto a = x.template load<V>(smaller(i, n - N));
      nans = V::either(nans, V::unordered(a, a));
      lo0 = V::min(a, lo0);
      hi0 = V::max(a, hi0);
    }
    lo = V::lowest(V::min(V::min(lo0, lo1), V::min(lo2, lo3)));
    hi = V::highest(V::max(V::max(hi0, hi1), V::max(hi2, hi3)));
    nan = V::any(nans);
  }
  *low = lo;
  *high = hi;
  *nonfinite = nan || (n > 0 && !is_finite_range(lo, hi));
}

template <class V, class S, class T>
void minmax(const S* x, int64_t n, T* low, T* high, bool* nonfinite) {
  minmax_of<V>(Elements<S>{x}, n, low, high, nonfinite);
}

template <class V, class Source, class T>
void minmax_finite_of(const Source& x, int64_t n, T* low, T* high, int64_t* nonfinite) {
  const auto bound = V::set1(largest<T>()), negative_bound = V::set1(-largest<T>());
  const auto inf = V::set1(infinity<T>()), negative_inf = V::set1(-infinity<T>());
  auto lows = inf;
  auto highs = negative_inf;
  int64_t finite = 0;
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) {
    const auto a = x.template load<V>(i);
    const auto keep = V::both(V::le(a, bound), V::le(negative_bound, a));
    finite += __builtin_popcount(V::bits(keep));
    lows = V::min(V::select(keep, a, inf), lows);
    highs = V::max(V::select(keep, a, negative_inf), highs);
  }
  T lo = V::lowest(lows);
  T hi = V::highest(highs);
  for (; i < n; ++i) {
    const T e = x.template load<Scalar<T>>(i);
    if (!(e <= largest<T>() && e >= -largest<T>())) continue;
    ++finite;
    lo = Scalar<T>::min(e, lo);
    hi = Scalar<T>::max(e, hi);
  }
  *low = lo;
  *high = hi;
  *nonfinite = n - finite;
}

template <class V, class S, class T>
void minmax_finite(const S* x, int64_t n, T* low, T* high, int64_t* nonfinite) {
  minmax_finite_of<V>(Elements<S>{x}, n, low, high, nonfinite);
}

// Finds the extremes of 16-bit floats by comparing their bits as integers, which needs neither a conversion to
// float nor a check for NaN. Interpreted as two's complement integers, positive floats are in ascending order
// and negative floats in descending order. So the largest signed, the largest unsigned and the smallest signed
// integer determine the extremes. NaN and infinities take part: they come after all finite elements of their
// sign.
template <class W>
struct WordExtremes {
  using Reg = typename W::Reg;
  Reg most_signed = W::set1(-0x8000), most_unsigned = W::set1(0), least_signed = W::set1(0x7fff);

  void fold(Reg a) {
    most_signed = W::max(a, most_signed);
    most_unsigned = W::max_unsigned(a, most_unsigned);
    least_signed = W::min(a, least_signed);
  }

  void fold(const WordExtremes& other) {
    most_signed = W::max(other.most_signed, most_signed);
    most_unsigned = W::max_unsigned(other.most_unsigned, most_unsigned);
    least_signed = W::min(other.least_signed, least_signed);
  }

  Reg low() const { return W::where_negative(most_unsigned, most_unsigned, least_signed); }
  Reg high() const { return W::where_negative(most_signed, least_signed, most_signed); }
};

template <class V, class S>
void minmax_words(const S* x, int64_t n, float* low, float* high, bool* nonfinite) {
  using W = typename V::Words;
  constexpr int N = W::N;
  if (n >= N) {
    WordExtremes<W> e0, e1, e2, e3;
    int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N) {
      fetch_ahead<4 * N>(x + i);
      e0.fold(W::load(x + i));
      e1.fold(W::load(x + i + N));
      e2.fold(W::load(x + i + 2 * N));
      e3.fold(W::load(x + i + 3 * N));
    }
    for (; i < n; i += N) e0.fold(W::load(x + smaller(i, n - N)));
    e0.fold(e1);
    e2.fold(e3);
    e0.fold(e2);
    const int most = W::highest(e0.most_signed), least = W::lowest(e0.least_signed);
    const int most_unsigned = W::highest_unsigned(e0.most_unsigned);
    const S lo = {static_cast<uint16_t>(most_unsigned >= 0x8000 ? most_unsigned : least)};
    const S hi = {static_cast<uint16_t>(most >= 0 ? most : least)};
    *low = to_compute(lo);
    *high = to_compute(hi);
    *nonfinite = false;
    if (is_finite_range(*low, *high)) return;
  }
  minmax<V, S, float>(x, n, low, high, nonfinite);
}

// Reduces adjacent columns of a matrix, row by row.
template <class V, int kVectors>
struct ColumnStrip {
  using T = typename V::Element;
  static constexpr int N = kVectors * V::N;

  ColumnStrip(const T* low, const T* high) {
    for (int v = 0; v < kVectors; ++v) {
      lows[v] = V::load(low + v * V::N);
      highs[v] = V::load(high + v * V::N);
    }
  }

  template <class S>
  void fold(const S* row) {
    typename V::Reg a[kVectors];
    for (int v = 0; v < kVectors; ++v) a[v] = V::load(row + v * V::N);
    for (int v = 0; v < kVectors; ++v) {
      if (v % 2 == 0) nans = V::either(nans, V::unordered(a[v], a[v + 1 < kVectors ? v + 1 : v]));
      lows[v] = V::min(a[v], lows[v]);
      highs[v] = V::max(a[v], highs[v]);
    }
  }

  // Stores the extremes. Returns whether there was a NaN.
  bool finish(T* low, T* high) const {
    for (int v = 0; v < kVectors; ++v) {
      V::store(low + v * V::N, lows[v]);
      V::store(high + v * V::N, highs[v]);
    }
    return V::any(nans);
  }

  typename V::Reg lows[kVectors], highs[kVectors];
  typename V::Mask nans = V::none();
};

template <class V, class S, int kVectors>
struct WordStrip {
  using W = typename V::Words;
  static constexpr int N = kVectors * W::N;

  WordStrip(const float*, const float*) {}

  void fold(const S* row) {
    for (int v = 0; v < kVectors; ++v) extremes[v].fold(W::load(row + v * W::N));
  }

  // Updates low and high. Returns whether there was a NaN or an infinity; if so, they lack some finite
  // elements.
  bool finish(float* low, float* high) const {
    bool finite = true;
    for (int v = 0; v < kVectors; ++v) {
      S lows[W::N], highs[W::N];
      W::store(lows, extremes[v].low());
      W::store(highs, extremes[v].high());
      for (int k = 0; k < W::N; k += V::N) {
        float* const l = low + v * W::N + k;
        float* const h = high + v * W::N + k;
        const auto a = V::load(lows + k), b = V::load(highs + k);
        const auto inside = V::both(V::le(V::set1(-largest<float>()), a), V::le(b, V::set1(largest<float>())));
        finite &= __builtin_popcount(V::bits(inside)) == V::N;
        V::store(l, V::min(a, V::load(l)));
        V::store(h, V::max(b, V::load(h)));
      }
    }
    return !finite;
  }

  WordExtremes<W> extremes[kVectors];
};

constexpr int64_t kRowBlock = 16384;  // bytes

// Reduces the columns [begin, end) as far as whole strips cover them. Returns the first column that is left.
template <class Strip, class S, class T>
int64_t minmax_strips(const S* x, int64_t rows, int64_t begin, int64_t end, int64_t row_stride, T* low, T* high,
                      bool* nonfinite) {
  // Prefetches these columns of the next block of rows, if the L1 cache has room for both blocks.
  const int64_t next = rows * row_stride * static_cast<int64_t>(sizeof(S));
  const bool fits = next <= kRowBlock;
  int64_t c = begin;
  for (; c + Strip::N <= end; c += Strip::N) {
    Strip strip(low + c, high + c);
    const S* p = x + c;
    for (int64_t r = 0; r < rows; ++r, p += row_stride) {
      if (fits) fetch_ahead<Strip::N>(p, next);
      strip.fold(p);
    }
    *nonfinite |= strip.finish(low + c, high + c);
  }
  return c;
}

// Calls f(x, rows) for blocks of rows that fill about a third of the L1 cache.
template <class S, class F>
void for_row_blocks(const S* x, int64_t rows, int64_t row_stride, const F& f) {
  constexpr int64_t kFewest = 8;
  const int64_t fitting = kRowBlock / (row_stride * static_cast<int64_t>(sizeof(S)));
  const int64_t count = fitting > kFewest ? fitting : kFewest;
  for (int64_t r = 0; r < rows; r += count) f(x + r * row_stride, smaller(count, rows - r));
}

template <class T>
bool holds_infinity(int64_t rows, int64_t columns, const T* low, const T* high) {
  bool infinite = false;
  for (int64_t c = 0; rows > 0 && c < columns; ++c) {
    // low > high if the column has only NaN.
    infinite |= low[c] <= high[c] && !is_finite_range(low[c], high[c]);
  }
  return infinite;
}

template <class V, class S, class T>
void minmax_columns(const S* x, int64_t rows, int64_t columns, int64_t row_stride, T* low, T* high,
                    bool* nonfinite) {
  bool nan = false;
  for_row_blocks(x, rows, row_stride, [&](const S* p, int64_t count) {
    int64_t c = minmax_strips<ColumnStrip<V, 4>>(p, count, 0, columns, row_stride, low, high, &nan);
    c = minmax_strips<ColumnStrip<V, 1>>(p, count, c, columns, row_stride, low, high, &nan);
    minmax_strips<ColumnStrip<Scalar<T>, 1>>(p, count, c, columns, row_stride, low, high, &nan);
  });
  *nonfinite = nan || holds_infinity(rows, columns, low, high);
}

template <class V, class S>
void minmax_columns_of_words(const S* x, int64_t rows, int64_t columns, int64_t row_stride, float* low,
                             float* high, bool* nonfinite) {
  bool found = false;
  for_row_blocks(x, rows, row_stride, [&](const S* p, int64_t count) {
    int64_t c = minmax_strips<WordStrip<V, S, 2>>(p, count, 0, columns, row_stride, low, high, &found);
    c = minmax_strips<WordStrip<V, S, 1>>(p, count, c, columns, row_stride, low, high, &found);
    minmax_strips<ColumnStrip<Scalar<float>, 1>>(p, count, c, columns, row_stride, low, high, &found);
  });
  *nonfinite = found || holds_infinity(rows, columns, low, high);
  // NaN and infinities hid some finite elements, so the columns are reduced again, in T. Elements that were
  // taken the first time do not change the result.
  if (*nonfinite) minmax_columns<V, S, float>(x, rows, columns, row_stride, low, high, nonfinite);
}

}  // namespace
}  // namespace fastquant
