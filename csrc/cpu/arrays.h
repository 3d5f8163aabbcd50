// Access to memory for the CPU code: reading and writing small buffers, and splitting large tensors into pieces
// for threads. Independent of torch and Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../math/elements.h"
#include "../memory.h"
#include "dispatch.h"
#include "kernels.h"

namespace fastquant {

// ------------------------------------------------------------------------------ types

inline const KernelsFor<float, float>& kernels_of(float) { return kernels().f32; }
inline const KernelsFor<double, double>& kernels_of(double) { return kernels().f64; }
inline const KernelsFor<Half, float>& kernels_of(Half) { return kernels().f16; }
inline const KernelsFor<BFloat16, float>& kernels_of(BFloat16) { return kernels().bf16; }

// ---------------------------------------------------------------------------- buffers

// Like a std::vector, but a few values need no allocation: for a small tensor, the allocations for ranges,
// scales and zero points would take as long as reading it.
template <class T>
class FewOrMany {
 public:
  explicit FewOrMany(int64_t count, T value = T{}) : count_(count), many_(count > kFew ? count + kLine : 0) {
    std::fill_n(data(), count, value);
  }

  int64_t size() const { return count_; }
  const T* data() const { return count_ > kFew ? many_.data() : few_; }
  T* data() { return count_ > kFew ? many_.data() : few_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + count_; }
  T* begin() { return data(); }
  const T& operator[](int64_t i) const { return data()[i]; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr int64_t kFew = 64;
  // Allocated beyond the values, so that what lies behind them in memory, perhaps another thread's, is in
  // another cache line.
  static constexpr int64_t kLine = 64 / sizeof(T);
  int64_t count_;
  T few_[kFew];
  std::vector<T> many_;
};

template <class T, class Values = std::vector<T>>
Values read_values(const Array& a) {
  Values values(a.numel);
  with_element(a.type, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(a.data);
    T* const into = values.data();
    for (int64_t i = 0; i < a.numel; ++i) into[i] = static_cast<T>(number(data[i]));
  });
  return values;
}

template <class Values>
void write_values(const Array& a, const Values& values) {
  with_element(a.type, [&](auto element) {
    auto* data = static_cast<decltype(element)*>(a.data);
    const auto* const from = values.data();
    const int64_t n = static_cast<int64_t>(values.size());
    for (int64_t i = 0; i < n; ++i) assign(data + i, from[i]);
  });
}

// The value of an array that has one element.
template <class T>
T read_value(const Array& a) {
  return with_element(a.type, [&](auto element) {
    return static_cast<T>(number(*static_cast<const decltype(element)*>(a.data)));
  });
}

template <class T>
void write_value(const Array& a, T value) {
  with_element(a.type, [&](auto element) { assign(static_cast<decltype(element)*>(a.data), value); });
}

inline void add_nonfinite(const Array& nonfinite_count, int64_t left_out) {
  if (left_out > 0) write_value(nonfinite_count, read_value<int64_t>(nonfinite_count) + left_out);
}
// ----------------------------------------------------------------------------- layout

// Splits [begin, end) at the boundaries between channels, and calls f(channel, begin, end) for each part.
template <class F>
void for_segments(const Dense& d, int64_t begin, int64_t end, const F& f) {
  int64_t row = begin / d.inner;
  int64_t channel = row % d.channels;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = std::min(end, (row + 1) * d.inner);
    f(channel, i, stop);
    i = stop;
    ++row;
    channel = channel + 1 == d.channels ? 0 : channel + 1;
  }
}

// The elements of one channel, side by side.
template <class S>
std::vector<S> elements_of_channel(const S* x, const Dense& d, int64_t channel) {
  std::vector<S> elements(d.outer * d.inner);
  for (int64_t o = 0; o < d.outer; ++o) {
    std::copy_n(x + (o * d.channels + channel) * d.inner, d.inner, elements.data() + o * d.inner);
  }
  return elements;
}

// ---------------------------------------------------------------------------- threads

// These two functions are defined by the program that links this code: ops.cpp uses torch's thread pool, tests
// their own threads.
int64_t thread_count();
// Calls f(context, i) for all i in [0, count), in parallel.
void run_parallel(int64_t count, void (*f)(void* context, int64_t i), void* context);

// How many elements a thread must have for its start to pay off.
constexpr int64_t kGrain = 65536;

// How many pieces to cut n elements into.
inline int64_t piece_count(int64_t n, int64_t grain = kGrain) {
  return n < 2 * grain ? 1 : std::min<int64_t>(thread_count(), n / grain);
}

// Calls f(begin, end) for the elements [begin, end) of a piece, in blocks from its end to its beginning: what
// the pass before has read last is read first, while it is still in the cache. `begin` of each is a multiple of
// 64 more than the piece's.
template <class F>
void for_blocks_backwards(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlock = 65536;
  while (begin < end) {
    const int64_t from = begin + (end - begin - 1) / kBlock * kBlock;
    f(from, end);
    end = from;
  }
}

// Splits [0, n) into `pieces` pieces and calls f(piece, begin, end) for each, in parallel. The length of each
// piece but the last is a multiple of `unit`.
template <class F>
void for_pieces(int64_t n, int64_t pieces, int64_t unit, const F& f) {
  if (pieces <= 1) {
    f(int64_t{0}, int64_t{0}, n);
    return;
  }
  const int64_t units = (n + unit - 1) / unit;
  const int64_t size = (units + pieces - 1) / pieces * unit;
  const auto piece = [&](int64_t p) {
    const int64_t begin = std::min(p * size, n);
    f(p, begin, std::min(begin + size, n));
  };
  using Piece = decltype(piece);
  run_parallel(
      pieces, [](void* context, int64_t p) { (*static_cast<const Piece*>(context))(p); },
      const_cast<void*>(static_cast<const void*>(&piece)));
}

}  // namespace fastquant
