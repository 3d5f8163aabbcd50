// Each kernel's body, once. V is a vector type (vec_scalar.h describes the interface), S
// the element type in memory, T the type of the arithmetic.
//
// Only for inclusion by the kernels_<isa>.cpp files. Everything is in an anonymous
// namespace, and nothing of std:: is used: a function that the linker could share with
// another file might bring this file's instructions to a processor that lacks them.
#pragma once

#include "../formulas.h"
#include "kernels.h"
#include "vec_scalar.h"

namespace fastquant {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for memory that comes `distance` bytes after the next elements, read or to be written; into the
// first-level cache, unless told otherwise. Left to themselves, processors fetch ahead no further than
// to the end of a page, and stores wait for their lines.
constexpr int kAhead = 4096;

template <int kElements, int kLocality = 3, class S>
void fetch_ahead(const S* p, int64_t distance = kAhead) {
  constexpr int kBytes = kElements * sizeof(S), kLine = 64;
  const char* const next = reinterpret_cast<const char*>(p) + distance;
  for (int k = 0; k < kBytes; k += kLine) __builtin_prefetch(next + k, 0, kLocality);
}

// ---------------------------------------------------------------------------- min/max

template <class T>
bool is_finite_range(T low, T high) {
  return low >= -largest<T>() && high <= largest<T>();
}

template <class V, class S, class T>
void minmax(const S* x, int64_t n, T* low, T* high, bool* nonfinite) {
  constexpr int N = V::N;
  T lo = infinity<T>();
  T hi = -infinity<T>();
  bool nan = false;
  if (n < N) {
    using One = Scalar<T>;
    for (int64_t i = 0; i < n; ++i) {
      const T e = One::load(x + i);
      nan |= One::unordered(e, e);
      lo = One::min(e, lo);
      hi = One::max(e, hi);
    }
  } else {
    // Four independent chains hide the latency of min and max.
    auto lo0 = V::set1(lo), lo1 = lo0, lo2 = lo0, lo3 = lo0;
    auto hi0 = V::set1(hi), hi1 = hi0, hi2 = hi0, hi3 = hi0;
    auto nans = V::none();
    int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N) {
      fetch_ahead<4 * N>(x + i);
      typename V::Reg a, b, c, d;
      V::load_pair(x + i, &a, &b);
      V::load_pair(x + i + 2 * N, &c, &d);
      // min and max drop NaN; one comparison finds it in two vectors.
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
      // The last vector may overlap the one before: seen twice, an element changes nothing.
      const auto a = V::load(x + smaller(i, n - N));
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
void minmax_finite(const S* x, int64_t n, T* low, T* high, int64_t* nonfinite) {
  const auto bound = V::set1(largest<T>()), negative_bound = V::set1(-largest<T>());
  const auto inf = V::set1(infinity<T>()), negative_inf = V::set1(-infinity<T>());
  auto lows = inf;
  auto highs = negative_inf;
  int64_t finite = 0;
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) {
    const auto a = V::load(x + i);
    const auto keep = V::both(V::le(a, bound), V::le(negative_bound, a));
    finite += __builtin_popcount(V::bits(keep));
    lows = V::min(V::select(keep, a, inf), lows);
    highs = V::max(V::select(keep, a, negative_inf), highs);
  }
  T lo = V::lowest(lows);
  T hi = V::highest(highs);
  for (; i < n; ++i) {
    const T e = Scalar<T>::load(x + i);
    if (!(e <= largest<T>() && e >= -largest<T>())) continue;
    ++finite;
    lo = Scalar<T>::min(e, lo);
    hi = Scalar<T>::max(e, hi);
  }
  *low = lo;
  *high = hi;
  *nonfinite = n - finite;
}

// The same of 16-bit elements, as integers: no element is widened, and none compared with itself.
// Read as a two's complement number, an element of either sign keeps its order among those of
// its sign, ascending where positive and descending where negative. So of all elements the
// largest signed, largest unsigned and smallest signed tell the extremes, NaN and infinities,
// which lie beyond all finite elements of their sign, included.
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

// The extremes of neighbouring columns, while one walks down the rows.
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

  // Whether there was a NaN.
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

  // Whether there was a NaN or an infinity; then low and high are short of elements.
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

// The columns [begin, end), as far as whole strips go.
template <class Strip, class S, class T>
int64_t minmax_strips(const S* x, int64_t rows, int64_t begin, int64_t end, int64_t row_stride, T* low, T* high,
                      bool* odd) {
  // The same columns of the next block of rows, where the first-level cache holds both.
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
    *odd |= strip.finish(low + c, high + c);
  }
  return c;
}

// f(x, rows) for blocks of rows that fill a third of the first-level cache.
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
    // Unless low and high still say that nothing was seen.
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
  bool odd = false;
  for_row_blocks(x, rows, row_stride, [&](const S* p, int64_t count) {
    int64_t c = minmax_strips<WordStrip<V, S, 2>>(p, count, 0, columns, row_stride, low, high, &odd);
    c = minmax_strips<WordStrip<V, S, 1>>(p, count, c, columns, row_stride, low, high, &odd);
    minmax_strips<ColumnStrip<Scalar<float>, 1>>(p, count, c, columns, row_stride, low, high, &odd);
  });
  *nonfinite = odd || holds_infinity(rows, columns, low, high);
  // Folded again, elements change nothing, but those that NaN and infinities hid are added.
  if (*nonfinite) minmax_columns<V, S, float>(x, rows, columns, row_stride, low, high, nonfinite);
}

// -------------------------------------------------------------------------- histogram

// Counting leaves memory idle: what comes after the caller's block can be on its way.
template <int kElements, class S>
void fetch_far_ahead(const S* p) {
  fetch_ahead<kElements, 2>(p, 32768);
}

// Adds elements to tables of counts; what lies outside of the range, to the entry after the last bin.
template <class V>
class BinCounter {
 public:
  using T = typename V::Element;
  static constexpr int kStep = 32;

  BinCounter(T low, T high, int64_t bins, uint32_t* counts, int tables)
      : formula_(BinFormula<V>::of(low, high, bins)),
        one_(BinFormula<Scalar<T>>::of(low, high, bins)),
        outside_(static_cast<T>(bins)) {
    for (int t = 0; t < 4; ++t) tables_[t] = tables == 4 ? counts + t * histogram_stride(bins) : counts;
  }

  // Finding bins and counting wait for different parts of the processor, so they alternate. An index
  // is read long after it was written: until it has left for the cache, reading it takes longer.
  template <bool kFromMemory = true, class S>
  void add(const S* x, int64_t n) const {
    constexpr int kRing = 4 * kStep;
    int32_t index[kRing];
    const int64_t whole = n - n % kStep;
    int64_t i = 0;
    for (; i < smaller(whole, kRing); i += kStep) locate(x + i, index + i);
    for (; i < whole; i += kStep) {
      int32_t* const slot = index + i % kRing;
      count(slot);
      if (kFromMemory) fetch_far_ahead<kStep>(x + i);
      locate(x + i, slot);
    }
    for (i = whole - smaller(whole, kRing); i < whole; i += kStep) count(index + i % kRing);
    for (; i < n; ++i) add_one(Scalar<T>::load(x + i), 1);
  }

  void add_one(T x, uint32_t times) const {
    tables_[0][static_cast<int32_t>(one_.inside(x) ? one_.bin(x) : outside_)] += times;
  }

 private:
  template <class S>
  void locate(const S* x, int32_t* index) const {
    for (int k = 0; k < kStep; k += V::N) {
      const auto a = V::load(x + k);
      V::store_index(index + k, V::select(formula_.inside(a), formula_.bin(a), V::set1(outside_)));
    }
  }

  void count(const int32_t* index) const {
    for (int k = 0; k < kStep; k += 4) {
      // Two indices a load: loads are what this loop has most of.
      uint64_t pairs[2];
      __builtin_memcpy(pairs, index + k, sizeof pairs);
      ++tables_[0][pairs[0] & 0xffffffffu];
      ++tables_[1][pairs[0] >> 32];
      ++tables_[2][pairs[1] & 0xffffffffu];
      ++tables_[3][pairs[1] >> 32];
    }
  }

  BinFormula<V> formula_;
  BinFormula<Scalar<T>> one_;
  T outside_;
  uint32_t* tables_[4];
};

// Counts a tensor that holds one value many times, as after ReLU, without an increment in memory for
// each of these elements. The others go on as one stream. The value is 0, or the end of the range
// that is nearest to it.
template <class V>
class FrequentValue {
 public:
  using T = typename V::Element;
  static constexpr int64_t kBlock = 8192;

  FrequentValue(T low, T high, const BinCounter<V>* counter)
      : value_(Scalar<T>::min(Scalar<T>::max(T{0}, low), high)), counter_(counter) {}

  // To be called last.
  void finish() {
    counter_->add(others_, held_);
    if (times_ > 0) counter_->add_one(value_, times_);
  }

  // Whether a look here and there finds enough of it for add() to be faster.
  template <class S>
  bool prevails(const S* x, int64_t n) const {
    constexpr int kLooks = 16;
    if (n < kLooks * V::N) return false;
    const auto value = V::set1(value_);
    int found = 0;
    for (int64_t k = 0; k < kLooks; ++k) {
      found += __builtin_popcount(V::bits(V::eq(V::load(x + k * (n / kLooks)), value)));
    }
    return 4 * found > kLooks * V::N;
  }

  template <class S>
  void add(const S* x, int64_t n) {
    const auto value = V::set1(value_);
    for (int64_t i = 0; i < n;) {
      const int64_t begin = i, before = held_;
      for (const int64_t stop = smaller(n - n % V::N, i + kChunk); i < stop; i += V::N) {
        fetch_far_ahead<V::N>(x + i);
        const auto a = V::load(x + i);
        held_ += V::store_others(others_ + held_, V::eq(a, value), a);
      }
      if (n - i < V::N) {
        for (; i < n; ++i) {
          others_[held_] = Scalar<T>::load(x + i);
          held_ += others_[held_] != value_;
        }
      }
      times_ += static_cast<uint32_t>((i - begin) - (held_ - before));
      // In whole steps; what is left over comes with the next ones.
      const int64_t whole = held_ - held_ % BinCounter<V>::kStep;
      counter_->template add<false>(others_, whole);
      held_ -= whole;
      for (int64_t k = 0; k < held_; ++k) others_[k] = others_[whole + k];
    }
  }

 private:
  static constexpr int64_t kChunk = 1024;

  T value_;
  const BinCounter<V>* counter_;
  uint32_t times_ = 0;
  int64_t held_ = 0;
  T others_[kChunk + BinCounter<V>::kStep + 2 * V::N];
};

template <class V, class S, class T>
void histogram(const S* x, int64_t n, T low, T high, int64_t bins, uint32_t* counts, int tables) {
  const BinCounter<V> counter(low, high, bins, counts, tables);
  if constexpr (V::kStoresOthers) {
    FrequentValue<V> frequent(low, high, &counter);
    constexpr int64_t kBlock = FrequentValue<V>::kBlock;
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t length = smaller(kBlock, n - i);
      if (frequent.prevails(x + i, length)) {
        frequent.add(x + i, length);
      } else {
        counter.add(x + i, length);
      }
    }
    frequent.finish();
  } else {
    counter.add(x, n);
  }
}

template <class D>
double sum_of_floats(const float* x, int64_t n) {
  constexpr int kLanes = kErrorLanes;
  constexpr int kRegs = kLanes / D::N;
  typename D::Reg sums[kRegs];
  for (int r = 0; r < kRegs; ++r) sums[r] = D::set1(0.0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegs; ++r) sums[r] = D::add(sums[r], D::load(x + i + r * D::N));
  }
  double lanes[kLanes];
  for (int r = 0; r < kRegs; ++r) D::store(lanes + r * D::N, sums[r]);
  double total = 0;
  for (int k = 0; k < kLanes; ++k) total += lanes[k];
  for (; i < n; ++i) total += static_cast<double>(x[i]);
  return total;
}

// The errors of the bins [begin, end), as far as whole vectors go; start_bin is the first
// quantized one.
template <class V>
int64_t errors_of_bins(const float* density, int64_t begin, int64_t end, int64_t start_bin,
                       const BinError<V>& error, float* out) {
  float steps[V::N];
  for (int k = 0; k < V::N; ++k) steps[k] = static_cast<float>(k);
  const auto lane = V::load(steps);
  int64_t i = begin;
  for (; i + V::N <= end; i += V::N) {
    const auto index = V::add(V::set1(static_cast<float>(i - start_bin)), lane);
    V::store(out + i, error(index, V::load(density + i)));
  }
  return i;
}

template <class V, class D>
double quantization_error(const float* density, int64_t bins, double bin_width, int64_t start_bin,
                          int64_t end_bin, double levels, float* scratch) {
  const double dst_width = bin_width * static_cast<double>(end_bin - start_bin + 1) / levels;
  if (dst_width == 0.0) return 0.0;
  const auto error = BinError<V>::of(bin_width, dst_width, levels);
  const auto one_error = BinError<Scalar<float>>::of(bin_width, dst_width, levels);
  const int64_t rest = errors_of_bins(density, 0, bins, start_bin, error, scratch);
  errors_of_bins(density, rest, bins, start_bin, one_error, scratch);
  return sum_of_floats<D>(scratch, bins);
}

// ---------------------------------------------------------------------- fake-quantize

// Packs bits into 64-bit words, a few at a time. Does nothing where there is no memory to
// write to.
class BitWriter {
 public:
  explicit BitWriter(uint64_t* words) : words_(words) {}

  // At most 63 bits.
  void push(uint64_t bits, int count) {
    if (words_ == nullptr) return;
    word_ |= bits << fill_;
    fill_ += count;
    if (fill_ < 64) return;
    *words_++ = word_;
    fill_ -= 64;
    word_ = fill_ == 0 ? 0 : bits >> (count - fill_);
  }

  void push_word(uint64_t bits) {
    *words_++ = word_ | bits << fill_;
    word_ = fill_ == 0 ? 0 : bits >> (64 - fill_);
  }

  void flush() {
    if (words_ != nullptr && fill_ > 0) *words_ = word_;
  }

 private:
  uint64_t* words_;
  uint64_t word_ = 0;
  int fill_ = 0;
};

template <class V, class T>
FakeQuantizer<V> quantizer_at(const QuantParams<T>& p, int64_t i) {
  return {V::load(p.scale + i), V::load(p.inverse_scale + i), V::load(p.low + i),
          V::load(p.high + i),  V::load(p.low_edge + i),      V::load(p.high_edge + i)};
}

template <class V, class T>
FakeQuantizer<V> quantizer_of_channel(const QuantParams<T>& p, int64_t c) {
  return {V::set1(p.scale[c]), V::set1(p.inverse_scale[c]), V::set1(p.low[c]),
          V::set1(p.high[c]),  V::set1(p.low_edge[c]),      V::set1(p.high_edge[c])};
}

// Elements [begin, end) with one quantizer.
template <bool kMask, class V, class S>
int64_t fake_quantize_run(const S* x, S* y, int64_t begin, int64_t end, const FakeQuantizer<V>& q,
                          BitWriter* writer) {
  constexpr int kPair = 2 * V::N;
  constexpr int kGroup = 64;  // pushed at once
  const auto pair = [&](int64_t i) {
    typename V::Reg a, b;
    V::load_pair(x + i, &a, &b);
    a = q.steps(a);
    b = q.steps(b);
    V::store_pair_normal(y + i, q.value(a), q.value(b));
    return kMask ? V::pair_bits(x, q.inside(a), q.inside(b)) : 0;
  };
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    fetch_ahead<kGroup>(x + i);
    fetch_ahead<kGroup>(y + i);
    uint64_t bits = 0;
    for (int k = 0; k < kGroup; k += kPair) bits |= static_cast<uint64_t>(pair(i + k)) << k;
    if (kMask) writer->push_word(bits);
  }
  for (; i + kPair <= end; i += kPair) {
    const uint64_t bits = pair(i);
    if (kMask) writer->push(bits, kPair);
  }
  return i;
}

template <bool kMask, class T, class S>
void fake_quantize_one(const S* x, S* y, const FakeQuantizer<Scalar<T>>& q, BitWriter* writer) {
  using One = Scalar<T>;
  const T t = q.steps(One::load(x));
  One::store(y, q.value(t));
  if (kMask) writer->push(q.inside(t), 1);
}

// With the parameters at i.
template <class S, class T>
void fake_quantize_exact(const S* x, S* y, const QuantParams<T>& p, int64_t i, BitWriter* writer) {
  using One = Scalar<T>;
  const ExactQuantizer<One> q = {p.scale[i],  p.inverse_scale[i], p.zero_point[i],
                                 p.quant_min, p.quant_max,        p.float_zero_point};
  bool inside;
  One::store(y, q.value(One::load(x), &inside));
  writer->push(inside, 1);
}

template <bool kMask, class V, class S, class T>
void fake_quantize_rows_masked(const S* x, S* y, int64_t begin, int64_t end, const QuantParams<T>& p,
                               BitWriter* writer) {
  int64_t row = begin / p.inner;
  int64_t channel = row % p.channels;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = smaller(end, (row + 1) * p.inner);
    if (!p.exact) {
      i = fake_quantize_run<kMask>(x, y, i, stop, quantizer_of_channel<V>(p, channel), writer);
      const auto one = quantizer_of_channel<Scalar<T>>(p, channel);
      for (; i < stop; ++i) fake_quantize_one<kMask, T>(x + i, y + i, one, writer);
    }
    for (; i < stop; ++i) fake_quantize_exact(x + i, y + i, p, channel, writer);
    ++row;
    channel = channel + 1 == p.channels ? 0 : channel + 1;
  }
}

template <bool kMask, class V, class S, class T>
void fake_quantize_periodic_masked(const S* x, S* y, int64_t begin, int64_t end, const QuantParams<T>& p,
                                   BitWriter* writer) {
  constexpr int kGroup = 64;  // fetched at once
  int64_t phase = begin % p.period;
  const auto advance = [&](int64_t by) {
    phase += by;
    if (phase >= p.period) phase -= p.period;
  };
  int64_t i = begin;
  if (!p.exact) {
    for (; i + V::N <= end; i += V::N, advance(V::N)) {
      if (i % kGroup == 0) {
        fetch_ahead<kGroup>(x + i);
        fetch_ahead<kGroup>(y + i);
      }
      const auto q = quantizer_at<V>(p, phase);
      const auto t = q.steps(V::load(x + i));
      V::store(y + i, q.value(t));
      if (kMask) writer->push(V::bits(q.inside(t)), V::N);
    }
    for (; i < end; ++i, advance(1)) {
      fake_quantize_one<kMask, T>(x + i, y + i, quantizer_at<Scalar<T>>(p, phase), writer);
    }
  }
  for (; i < end; ++i, advance(1)) {
    fake_quantize_exact(x + i, y + i, p, phase, writer);
  }
}

template <class V, class S, class T>
void fake_quantize_rows(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end, const QuantParams<T>& p) {
  BitWriter writer(mask == nullptr ? nullptr : mask + begin / 64);
  if (mask == nullptr) {
    fake_quantize_rows_masked<false, V>(x, y, begin, end, p, &writer);
  } else {
    fake_quantize_rows_masked<true, V>(x, y, begin, end, p, &writer);
  }
  writer.flush();
}

template <class V, class S, class T>
void fake_quantize_periodic(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                            const QuantParams<T>& p) {
  BitWriter writer(mask == nullptr ? nullptr : mask + begin / 64);
  if (mask == nullptr) {
    fake_quantize_periodic_masked<false, V>(x, y, begin, end, p, &writer);
  } else {
    fake_quantize_periodic_masked<true, V>(x, y, begin, end, p, &writer);
  }
  writer.flush();
}

template <class V, class S, class T>
void mask_gradient(const S* grad, const uint64_t* mask, S* out, int64_t begin, int64_t end) {
  // A product, not a selection: the sign of zero, and NaN, come out as torch's.
  const auto zero = V::set1(T{0}), one = V::set1(T{1});
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    fetch_ahead<64>(grad + i);
    fetch_ahead<64>(out + i);
    uint64_t word = mask[i / 64];
    for (int k = 0; k < 64; k += V::N) {
      const auto keep = V::select(V::from_bits(static_cast<uint32_t>(word >> k)), one, zero);
      V::store(out + i + k, V::mul(V::load(grad + i + k), keep));
    }
  }
  for (; i < end; ++i) {
    const T keep = static_cast<T>((mask[i / 64] >> (i % 64)) & 1u);
    Scalar<T>::store(out + i, Scalar<T>::load(grad + i) * keep);
  }
}

template <class V, class S, class T>
int64_t learnable_backward_run(const S* grad, const S* x, S* grad_x, int64_t begin, int64_t n, T scale,
                               T inverse_scale, T zero_point, T quant_min, T quant_max, T grad_factor,
                               LearnableSums* sums) {
  constexpr int64_t kBlock = 1024;  // short enough for sums in T
  const auto gradients =
      LearnableGradients<V>::of(scale, inverse_scale, zero_point, quant_min, quant_max, grad_factor);
  int64_t i = begin;
  while (i + V::N <= n) {
    auto scale_sum = V::set1(T{0}), zero_point_sum = scale_sum;
    const int64_t stop = smaller(n, i + kBlock);
    for (; i + V::N <= stop; i += V::N) {
      const auto terms = gradients(V::load(grad + i), V::load(x + i));
      V::store(grad_x + i, terms.x);
      scale_sum = V::add(scale_sum, terms.scale);
      zero_point_sum = V::add(zero_point_sum, terms.zero_point);
    }
    T lanes[V::N];
    V::store(lanes, scale_sum);
    for (int k = 0; k < V::N; ++k) sums->scale += static_cast<double>(lanes[k]);
    V::store(lanes, zero_point_sum);
    for (int k = 0; k < V::N; ++k) sums->zero_point += static_cast<double>(lanes[k]);
    if (stop - i < V::N && stop == n) break;
  }
  return i;
}

template <class V, class S, class T>
LearnableSums learnable_backward(const S* grad, const S* x, S* grad_x, int64_t n, T scale, T inverse_scale,
                                 T zero_point, T quant_min, T quant_max, T grad_factor) {
  LearnableSums sums = {0, 0};
  const int64_t rest = learnable_backward_run<V>(grad, x, grad_x, 0, n, scale, inverse_scale, zero_point,
                                                 quant_min, quant_max, grad_factor, &sums);
  learnable_backward_run<Scalar<T>>(grad, x, grad_x, rest, n, scale, inverse_scale, zero_point, quant_min,
                                    quant_max, grad_factor, &sums);
  return sums;
}

// --------------------------------------------------------------------------- quantize

// Compilers vectorize this loop themselves.
template <class V>
void quantize(const float* x, int8_t* out, int64_t n, float inverse_scale, float low, float high) {
  for (int64_t i = 0; i < n; ++i) out[i] = quantized_to_int8(x[i], inverse_scale, low, high);
}

// ------------------------------------------------------------------------------ table

template <class V, class S>
constexpr KernelsFor<S, typename V::Element> kernels_for() {
  using T = typename V::Element;
  KernelsFor<S, T> kernels = {
      minmax<V, S, T>,        minmax_finite<V, S, T>,      minmax_columns<V, S, T>,
      histogram<V, S, T>,     fake_quantize_rows<V, S, T>, fake_quantize_periodic<V, S, T>,
      mask_gradient<V, S, T>, learnable_backward<V, S, T>,
  };
  if constexpr (sizeof(S) == 2 && V::N > 1) {
    kernels.minmax = minmax_words<V, S>;
    kernels.minmax_columns = minmax_columns_of_words<V, S>;
  }
  return kernels;
}

template <template <class> class V>
constexpr Kernels kernel_table(const char* isa) {
  return {
      isa,
      kernels_for<V<float>, float>(),
      kernels_for<V<double>, double>(),
      kernels_for<V<float>, Half>(),
      kernels_for<V<float>, BFloat16>(),
      quantization_error<V<float>, V<double>>,
      quantize<V<float>>,
  };
}

}  // namespace
}  // namespace fastquant
