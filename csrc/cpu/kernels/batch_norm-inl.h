// Kernels for batch norm with an activation and fake-quantize: moments of channels, the forward pass,
// gradients.
//
// Elements of one channel come in rows (other dimensions follow the channels in memory), or as the column of a
// matrix (channels come last). Sums are taken in a fixed order: the same bits on every instruction set.
#pragma once

#include <type_traits>

#include "../../math/batch_norm.h"
#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// Elements i, i + kChains, i + 2 kChains, … of a chunk are summed one after another, then these sums.
template <class T>
constexpr int kChains = static_cast<int>(128 / sizeof(T));

// ------------------------------------------------------------------------------- rows

template <int N, class S>
void copy_elements(const S* from, S* to) {
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// Calls each(a, b, out) for vectors of n elements, and wide(i) for pairs of them from element i on, as long as
// there are any. The last vector may overlap the one before, and fewer elements than one vector are worked on
// in a copy. `out` may be `a`.
template <class V, class S, class Wide, class Each>
void for_run(const S* a, const S* b, S* out, int64_t n, const Wide& wide, const Each& each) {
  constexpr int N = V::N;
  S copies[2][N] = {};
  if (n < N) {
    S result[N];
    for (int64_t i = 0; i < n; ++i) copies[0][i] = a[i], copies[1][i] = b[i];
    each(copies[0], copies[1], result);
    for (int64_t i = 0; i < n; ++i) out[i] = result[i];
    return;
  }
  const int64_t last = n - N;
  const bool overlaps = n % N != 0;
  if (overlaps) copy_elements<N>(a + last, copies[0]), copy_elements<N>(b + last, copies[1]);
  int64_t i = 0;
  for (; i + 2 * N <= n; i += 2 * N) wide(i);
  if (i + N <= n) each(a + i, b + i, out + i);
  if (overlaps) each(copies[0], copies[1], out + last);
}

// Copies the rows of a chunk one after the other, in the type of the arithmetic.
template <class V, class S, class T>
void gather_rows(const S* x, const ChannelChunk& chunk, T* out) {
  constexpr int N = V::N;
  for (int64_t r = 0; r < chunk.rows; ++r, x += chunk.stride, out += chunk.length) {
    for (int64_t i = 0; i + N <= chunk.length; i += N) {
      fetch_ahead<N>(x + i, chunk.ahead);
      V::store(out + i, V::load(x + i));
    }
    for (int64_t i = chunk.length / N * N; i < chunk.length; ++i) out[i] = Scalar<T>::load(x + i);
  }
}

// Copies n elements and fills up a block with the first of them.
template <class S, class T>
void copy_tail(const S* x, int64_t n, T* block) {
  for (int64_t i = 0; i < kChains<T>; ++i) block[i] = Scalar<T>::load(x + (i < n ? i : 0));
}

// The sum of 2 kHalf numbers: each half is added to the other, until one number is left.
template <int kHalf, class X>
X sum_in_halves(X* x) {
  for (int i = 0; i < kHalf; ++i) x[i] += x[i + kHalf];
  if constexpr (kHalf > 1) return sum_in_halves<kHalf / 2>(x);
  return x[0];
}

// Puts the elements of a pair of vectors, as load_pair returns them, in the order in which they lie in memory
// as elements of S.
template <class V, class S>
void in_order([[maybe_unused]] typename V::Reg* a, [[maybe_unused]] typename V::Reg* b) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    if constexpr (V::kAlternates) {
      const auto even = *a, odd = *b;
      *a = V::zip_low(even, odd);
      *b = V::zip_high(even, odd);
    }
  }
}

// Calls f(v, pair) for the vectors v and v + 1 of a block of kChains elements.
template <class V, class S, class F>
void for_pairs(const S* x, const F& f) {
  for (int v = 0; v < kChains<typename V::Element> / V::N; v += 2) {
    typename V::Reg pair[2];
    V::load_pair(x + v * V::N, &pair[0], &pair[1]);
    f(v, pair);
  }
}

// Vectors that hold one sum per chain.
template <class V>
struct ChainSums {
  using T = typename V::Element;
  static constexpr int kVectors = kChains<T> / V::N;
  typename V::Reg sums[kVectors];

  ChainSums() {
    for (int v = 0; v < kVectors; ++v) sums[v] = V::set1(T{0});
  }

  // To be called when elements of S have been added in pairs of vectors.
  template <class S>
  void put_in_order() {
    for (int v = 0; v < kVectors; v += 2) in_order<V, S>(&sums[v], &sums[v + 1]);
  }

  double total() const {
    T chains[kChains<T>];
    for (int v = 0; v < kVectors; ++v) V::store(chains + v * V::N, sums[v]);
    double wide[kChains<T>];
    for (int k = 0; k < kChains<T>; ++k) wide[k] = static_cast<double>(chains[k]);
    return sum_in_halves<kChains<T> / 2>(wide);
  }
};

// The moments of n elements by plain loops, where squares overflow or something is not finite.
template <class S, class T>
ChunkMoments moments_one_by_one(const S* x, int64_t n, int64_t stride) {
  using One = Scalar<T>;
  T low = infinity<T>(), high = -infinity<T>();
  double sum = 0, squares = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const T e = One::load(x + i * stride);
    finite &= e - e == 0;
    low = One::min(e, low);
    high = One::max(e, high);
    sum += static_cast<double>(e);
  }
  const double mean = sum / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(One::load(x + i * stride)) - mean;
    squares += d * d;
  }
  return {mean, squares, static_cast<double>(low), static_cast<double>(high), finite};
}

// What was summed about a centre.
template <class T>
struct MomentsAbout {
  T centre;
  double distances, squares;
  T low, high;

  ChunkMoments moments(int64_t n) const {
    const double distance = distances / static_cast<double>(n), rest = squares - distances * distance;
    return {static_cast<double>(centre) + distance, rest < 0 ? 0 : rest, static_cast<double>(low),
            static_cast<double>(high), rest - rest == 0};
  }
};

// Sums the distances of elements from a centre near their mean, and their squares. If the centre is the mean of
// k of the n elements, its squared distance from the mean of all is at most n / k times their variance: little
// cancels when it is taken off, however large the mean is.
template <class V>
class MomentSums {
 public:
  using T = typename V::Element;
  static constexpr int kBlock = kChains<T>;

  // first: kBlock elements.
  template <class S>
  explicit MomentSums(const S* first) {
    T some[kBlock];
    for (int k = 0; k < kBlock; k += V::N) V::store(some + k, V::load(first + k));
    centre_ = sum_in_halves<kBlock / 2>(some) / static_cast<T>(kBlock);
    lows_[0] = lows_[1] = V::set1(infinity<T>());
    highs_[0] = highs_[1] = V::set1(-infinity<T>());
  }

  T centre() const { return centre_; }

  template <class S>
  void add(const S* x) {
    add_extremes(x);
    add_sums(x);
  }

  template <class S>
  void add_extremes(const S* x) {
    for_pairs<V>(x, [&](int, const auto& pair) {
      for (int k = 0; k < 2; ++k) {
        lows_[k] = V::min(pair[k], lows_[k]);
        highs_[k] = V::max(pair[k], highs_[k]);
      }
    });
  }

  template <class S>
  void add_sums(const S* x) {
    const auto centre = V::set1(centre_);
    for_pairs<V>(x, [&](int v, const auto& pair) {
      for (int k = 0; k < 2; ++k) {
        const auto d = V::sub(pair[k], centre);
        distances_.sums[v + k] = V::add(distances_.sums[v + k], d);
        squares_.sums[v + k] = V::add(squares_.sums[v + k], V::mul(d, d));
      }
    });
  }

  template <class S>
  void put_in_order() {
    distances_.template put_in_order<S>();
    squares_.template put_in_order<S>();
  }

  ChunkMoments of(int64_t n) const {
    const MomentsAbout<T> about = {centre_, distances_.total(), squares_.total(),
                                   V::lowest(V::min(lows_[1], lows_[0])),
                                   V::highest(V::max(highs_[1], highs_[0]))};
    return about.moments(n);
  }

 private:
  T centre_;
  ChainSums<V> distances_, squares_;
  typename V::Reg lows_[2], highs_[2];
};

template <class V, class S>
ChunkMoments moments_of_run(const S* x, int64_t n, int64_t ahead) {
  using T = typename V::Element;
  constexpr int kBlock = kChains<T>;
  const int64_t whole = n / kBlock * kBlock;
  T tail[kBlock];
  if (whole < n) copy_tail(x + whole, n - whole, tail);
  MomentSums<V> sums = whole > 0 ? MomentSums<V>(x) : MomentSums<V>(tail);
  for (int64_t i = 0; i < whole; i += kBlock) {
    fetch_ahead<kBlock>(x + i, ahead);
    sums.add(x + i);
  }
  sums.template put_in_order<S>();
  if (whole < n) {
    sums.add_extremes(tail);
    // What only fills up lies at the centre, where it adds nothing.
    for (int64_t i = n - whole; i < kBlock; ++i) tail[i] = sums.centre();
    sums.add_sums(tail);
  }
  const ChunkMoments result = sums.of(n);
  return result.finite ? result : moments_one_by_one<S, T>(x, n, 1);
}

template <class V, class S, class T>
void moments_of_rows(const S* x, const ChannelChunk& chunk, ChunkMoments* out) {
  if (chunk.rows == 1) {
    *out = moments_of_run<V>(x, chunk.length, chunk.ahead);
    return;
  }
  T values[kMostGathered];
  gather_rows<V>(x, chunk, values);
  *out = moments_of_run<V>(static_cast<const T*>(values), chunk.rows * chunk.length, 0);
}

template <class V, class T>
Normalizer<V> normalizer_of(const ChannelNorm<T>& norm) {
  return {V::set1(norm.mean), V::set1(norm.gain), V::set1(norm.bias)};
}

template <class V, class T>
Normalizer<V> normalizer_at(const NormColumns<T>& norm, int64_t c) {
  return {V::load(norm.mean + c), V::load(norm.gain + c), V::load(norm.bias + c)};
}

// Every NaN as the same NaN. Where an operation has two NaN, processors and compilers differ in which of them
// it returns, and in the sign of a new one.
template <class V, bool kNeeded>
typename V::Reg same_nan(typename V::Reg x) {
  if constexpr (!kNeeded) return x;
  return V::select(V::unordered(x, x), V::set1(static_cast<typename V::Element>(__builtin_nan(""))), x);
}

// The ways from a normalized value to the result.
template <class V>
struct Quantized {
  using Vector = V;
  NormalizedQuantizer<V> quantizer;
  explicit Quantized(const Activation<typename V::Element>& a)
      : quantizer{V::set1(a.quantizer.inverse_scale), V::set1(a.step_low), V::set1(a.step_high),
                  V::set1(a.quantizer.scale)} {}
  typename V::Reg operator()(typename V::Reg x) const { return quantizer.value(x); }
};

template <class V>
struct Clamped {
  using Vector = V;
  typename V::Reg low, high;
  explicit Clamped(const Activation<typename V::Element>& a) : low(V::set1(a.low)), high(V::set1(a.high)) {}
  typename V::Reg operator()(typename V::Reg x) const { return clamped<V>(x, low, high); }
};

template <class One>
struct Exactly {
  using Vector = One;
  const Activation<typename One::Element>& activation;
  explicit Exactly(const Activation<typename One::Element>& a) : activation(a) {}
  typename One::Reg operator()(typename One::Reg x) const { return activated<One>(activation, x); }
};

template <class V, class T, class F>
void with_way(const Activation<T>& a, const F& f) {
  if (!a.quantizes) {
    f(Clamped<V>(a));
  } else if (!a.quantizer.exact) {
    f(Quantized<V>(a));
  } else {
    f(Exactly<Scalar<T>>(a));
  }
}

template <bool kSameNan, class Way, class S, class T>
void normalize_rows_by(const S* x, S* y, const ChannelChunk& chunk, const ChannelNorm<T>& norm,
                       const Way& way) {
  using V = typename Way::Vector;
  const auto n = normalizer_of<V>(norm);
  const auto result = [&](typename V::Reg a) { return same_nan<V, kSameNan>(way(n.normalized(n.centred(a)))); };
  for (int64_t r = 0; r < chunk.rows; ++r, x += chunk.stride, y += chunk.stride) {
    const auto wide = [&](int64_t i) {
      fetch_ahead<2 * V::N>(x + i, chunk.ahead);
      fetch_ahead<2 * V::N>(y + i, chunk.ahead);
      typename V::Reg a, b;
      V::load_pair(x + i, &a, &b);
      V::store_pair_normal(y + i, result(a), result(b));
    };
    const auto each = [&](const S* from, const S*, S* to) { V::store(to, result(V::load(from))); };
    for_run<V>(x, x, y, chunk.length, wide, each);
  }
}

template <class V, class S, class T>
void normalize_rows(const S* x, S* y, const ChannelChunk& chunk, const ChannelNorm<T>& norm,
                    const Activation<T>& activation) {
  with_way<V>(activation, [&](const auto& way) {
    if (is_ordinary(norm.mean, norm.gain, norm.bias)) {
      normalize_rows_by<false>(x, y, chunk, norm, way);
    } else {
      normalize_rows_by<true>(x, y, chunk, norm, way);
    }
  });
}

// ---------------------------------------------------------------------- gradients of rows

template <class V, class T>
NormGradients<V> gradients_of(const Range<T>& range) {
  return {V::set1(range.low), V::set1(range.high), V::set1(T{0})};
}

template <class V, class S, class T>
void gradient_sums_of_run(const S* grad, const S* x, int64_t n, int64_t ahead, const ChannelNorm<T>& norm,
                          const Range<T>& range, GradientSums* out) {
  constexpr int kBlock = kChains<T>;
  const auto normalizer = normalizer_of<V>(norm);
  const auto gradients = gradients_of<V>(range);
  ChainSums<V> of_bias, of_gain;
  const auto add = [&](const auto* g, const auto* e) {
    for_pairs<V>(g, [&](int v, const auto& pair) {
      typename V::Reg values[2];
      V::load_pair(e + v * V::N, &values[0], &values[1]);
      for (int k = 0; k < 2; ++k) {
        const auto centred = normalizer.centred(values[k]);
        const auto passed = gradients.passed(pair[k], normalizer.normalized(centred));
        of_bias.sums[v + k] = V::add(of_bias.sums[v + k], passed);
        of_gain.sums[v + k] = V::add(of_gain.sums[v + k], V::mul(passed, centred));
      }
    });
  };
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock) {
    fetch_ahead<kBlock>(grad + i, ahead);
    fetch_ahead<kBlock>(x + i, ahead);
    add(grad + i, x + i);
  }
  of_bias.template put_in_order<S>();
  of_gain.template put_in_order<S>();
  if (whole < n) {
    T grad_tail[kBlock], x_tail[kBlock];
    copy_tail(grad + whole, n - whole, grad_tail);
    copy_tail(x + whole, n - whole, x_tail);
    for (int64_t i = n - whole; i < kBlock; ++i) grad_tail[i] = T{0}, x_tail[i] = norm.mean;
    add(static_cast<const T*>(grad_tail), static_cast<const T*>(x_tail));
  }
  out->of_bias += of_bias.total();
  out->of_gain += of_gain.total();
}

template <class V, class S, class T>
void gradient_sums_of_rows(const S* grad, const S* x, const ChannelChunk& chunk, const ChannelNorm<T>& norm,
                           const Range<T>& range, GradientSums* out) {
  if (chunk.rows == 1) {
    gradient_sums_of_run<V>(grad, x, chunk.length, chunk.ahead, norm, range, out);
    return;
  }
  T grads[kMostGathered], values[kMostGathered];
  gather_rows<V>(grad, chunk, grads);
  gather_rows<V>(x, chunk, values);
  gradient_sums_of_run<V>(static_cast<const T*>(grads), static_cast<const T*>(values),
                          chunk.rows * chunk.length, 0, norm, range, out);
}

template <bool kSameNan, bool kTraining, class V, class S, class T>
void gradient_of_rows_by(const S* grad, const S* x, S* grad_x, const ChannelChunk& chunk,
                         const ChannelNorm<T>& norm, const Range<T>& range, const GradientMeans<T>& means) {
  const auto normalizer = normalizer_of<V>(norm);
  const auto gradients = gradients_of<V>(range);
  const auto offset = V::set1(means.offset), slope = V::set1(means.slope);
  const auto result = [&](typename V::Reg g, typename V::Reg e) {
    const auto centred = normalizer.centred(e);
    const auto passed = gradients.passed(g, normalizer.normalized(centred));
    return same_nan<V, kSameNan>(kTraining ? gradient_of_x<V>(passed, centred, normalizer.gain, offset, slope)
                                           : V::mul(normalizer.gain, passed));
  };
  for (int64_t r = 0; r < chunk.rows; ++r, grad += chunk.stride, x += chunk.stride, grad_x += chunk.stride) {
    const auto wide = [&](int64_t i) {
      fetch_ahead<2 * V::N>(grad_x + i, chunk.ahead);
      typename V::Reg g[2], e[2];
      V::load_pair(grad + i, &g[0], &g[1]);
      V::load_pair(x + i, &e[0], &e[1]);
      V::store_pair_normal(grad_x + i, result(g[0], e[0]), result(g[1], e[1]));
    };
    const auto each = [&](const S* g, const S* e, S* to) { V::store(to, result(V::load(g), V::load(e))); };
    for_run<V>(grad, x, grad_x, chunk.length, wide, each);
  }
}

template <class V, class S, class T>
void gradient_of_rows(const S* grad, const S* x, S* grad_x, const ChannelChunk& chunk,
                      const ChannelNorm<T>& norm, const Range<T>& range, const GradientMeans<T>* means) {
  if (means == nullptr) {
    if (is_ordinary(norm.mean, norm.gain, norm.bias)) {
      gradient_of_rows_by<false, false, V>(grad, x, grad_x, chunk, norm, range, {});
    } else {
      gradient_of_rows_by<true, false, V>(grad, x, grad_x, chunk, norm, range, {});
    }
  } else if (is_ordinary(norm.mean, norm.gain, norm.bias) && is_ordinary(means->offset, T{1}, means->slope)) {
    gradient_of_rows_by<false, true, V>(grad, x, grad_x, chunk, norm, range, *means);
  } else {
    gradient_of_rows_by<true, true, V>(grad, x, grad_x, chunk, norm, range, *means);
  }
}

// ---------------------------------------------------------------------------- columns

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

// See MomentSums. Here, the centre of a column is the mean of its first rows.
template <class V, class S, class T>
void moments_of_vectors(const ColumnVectors<V>& vectors, const S* x, int64_t rows, T* scratch, double* totals,
                        ChunkMoments* out) {
  const int64_t columns = vectors.columns, slots = vectors.slots(), first = smaller(rows, kSummedRows);
  T *const centre = scratch, *const distance = centre + slots, *const square = distance + slots;
  T *const lows = square + slots, *const highs = lows + slots;
  double *const distances = totals, *const squares = totals + columns;
  for (int64_t i = 0; i < slots; ++i) {
    centre[i] = distance[i] = square[i] = 0;
    lows[i] = infinity<T>(), highs[i] = -infinity<T>();
  }
  for (int64_t c = 0; c < 2 * columns; ++c) totals[c] = 0;
  for (int64_t r = 0; r < first; ++r) {
    for (int64_t slot = 0; slot < slots; slot += V::N) {
      const auto e = V::load(x + r * columns + vectors.column(slot));
      V::store(centre + slot, V::add(V::load(centre + slot), e));
    }
  }
  for (int64_t i = 0; i < slots; ++i) centre[i] /= static_cast<T>(first);
  const RowGroups<S> groups(columns);
  const int64_t ahead = groups.ahead_of_reads();
  groups.each(rows, [&](int64_t begin, int64_t end) {
    for_blocks(vectors, [&](auto count, int64_t slot) {
      constexpr int kCount = decltype(count)::value;
      typename V::Reg about[kCount], sum[kCount], squares_sum[kCount], low[kCount], high[kCount];
      const S* column[kCount];
      for (int k = 0; k < kCount; ++k) {
        const int64_t at = slot + k * V::N;
        about[k] = V::load(centre + at);
        sum[k] = V::load(distance + at), squares_sum[k] = V::load(square + at);
        low[k] = V::load(lows + at), high[k] = V::load(highs + at);
        column[k] = x + vectors.column(at);
      }
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
      for (int k = 0; k < kCount; ++k) {
        const int64_t at = slot + k * V::N;
        V::store(distance + at, sum[k]), V::store(square + at, squares_sum[k]);
        V::store(lows + at, low[k]), V::store(highs + at, high[k]);
      }
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
      for (int k = 0; k < kCount; ++k) {
        bias_sum[k] = V::load(bias_sums + slot + k * V::N);
        gain_sum[k] = V::load(gain_sums + slot + k * V::N);
      }
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
      for (int k = 0; k < kCount; ++k) {
        V::store(bias_sums + slot + k * V::N, bias_sum[k]);
        V::store(gain_sums + slot + k * V::N, gain_sum[k]);
      }
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
