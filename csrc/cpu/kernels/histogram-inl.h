// Kernels that count elements in bins and that resample counts to other bins.
#pragma once

#include "../../math/histogram.h"
#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// Prefetches far ahead, even beyond the block that the caller passed: counting leaves memory bandwidth unused.
template <int kElements, class S>
void fetch_far_ahead(const S* p) {
  fetch_ahead<kElements, 2>(p, 32768);
}

// Counts elements in tables of counts, and those outside the range in the entry after the last bin.
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

  // Finding bins is limited by arithmetic and counting by memory accesses, so the two alternate, and the
  // processor overlaps them. A ring of indices delays counting until an index has left the store buffer:
  // forwarding from there would be slower.
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
      // Each load reads two indices, since this loop is limited by loads.
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

// Counts the elements of a tensor that has one value very often, like 0 after ReLU. Occurrences of that value
// are counted in a register. All other elements are packed into a buffer, which BinCounter counts. The value is
// 0 or, if the range does not include 0, the end of the range that is nearest to it.
template <class V>
class FrequentValue {
 public:
  using T = typename V::Element;
  static constexpr int64_t kBlock = 8192;

  FrequentValue(T low, T high, const BinCounter<V>* counter)
      : value_(Scalar<T>::min(Scalar<T>::max(T{0}, low), high)), counter_(counter) {}

  // Counts what is still buffered. Must be called once, at the end.
  void finish() {
    counter_->add(others_, held_);
    if (times_ > 0) counter_->add_one(value_, times_);
  }

  // Whether the value is so frequent, in a sample of x, that add() is faster than BinCounter::add.
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
      // Counts whole steps only; the remaining elements stay in the buffer for the next round.
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

template <class T>
void parts_before(const HistogramRange& from, const HistogramRange& to, int64_t bins, int64_t upsample_rate,
                  int64_t* parts) {
  const Resampling<T> resampling(from, to, bins, upsample_rate);
  for (int64_t b = 0; b < bins; ++b) parts[b] = resampling.parts_before(b + 1);
}

}  // namespace
}  // namespace fastquant
