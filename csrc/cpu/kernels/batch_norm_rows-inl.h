// Kernels for batch norm with an activation and fake-quantize where the elements of a channel come in rows:
// moments of channels, the forward pass, gradients.
#pragma once

#include "batch_norm-inl.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// Elements i, i + kChains, i + 2 kChains, … of a chunk are summed one after another, then these sums.
template <class T>
constexpr int kChains = static_cast<int>(128 / sizeof(T));

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

// --------------------------------------------------------------------------- gradients

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

}  // namespace
}  // namespace fastquant
