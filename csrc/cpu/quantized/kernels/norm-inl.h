// The bodies of the kernels for normalizing. Everything here is in an anonymous namespace, and std:: is not
// used: see ../../kernels-inl.h.
#pragma once

#include "../norm_kernels.h"
#include "output_of-inl.h"
#include "sums-inl.h"
#include "vectors-inl.h"

namespace fastquant {
namespace {

// Sums of bytes and of their squares.
template <class B>
class Moments {
 public:
  Moments() {
    for (auto& s : squares_) s = B::ints1(0);
  }

  static constexpr int64_t kMost = 32768;  // times 255 * 255 fits in int32

  // At most kMost times.
  void add(typename B::Reg x) {
    typename B::Words squares[B::kHalves];
    sums_.add(x);
    B::squares(x, squares);
    B::add_words(squares, squares_);
  }

  // Calls f(byte, its sum, its sum of squares).
  template <class F>
  void for_each(const F& f) {
    const auto* const sums = sums_.sums();
    for (int k = 0; k < B::kParts; ++k) {
      int32_t sum[B::Floats::N], square[B::Floats::N];
      B::store_ints(sum, sums[k]);
      B::store_ints(square, squares_[k]);
      for (int i = 0; i < B::Floats::N; ++i) f(B::index_of(k, i), sum[i], square[i]);
    }
  }

 private:
  Sums<B> sums_;
  typename B::Ints squares_[B::kParts];
};

template <class B>
void moments_of_columns(Rows<const uint8_t> x, int64_t rows, int64_t columns, uint8_t flip, int64_t* sums,
                        int64_t* squares) {
  const auto flips = B::set1(flip);
  for (int64_t first = 0; first < rows; first += Moments<B>::kMost) {
    const int64_t end = first + Moments<B>::kMost < rows ? first + Moments<B>::kMost : rows;
    for_vectors<B>(columns, [&](int64_t c, const auto& load, const auto&) {
      Moments<B> moments;
      for (int64_t r = first; r < end; ++r) moments.add(B::flip(load(x.data + r * x.stride + c), flips));
      moments.for_each([&](int64_t i, int64_t sum, int64_t square) {
        if (c + i >= columns) return;
        sums[c + i] += sum;
        squares[c + i] += square;
      });
    });
  }
}

template <class B>
void moments(const uint8_t* x, int64_t n, uint8_t flip, int64_t* sum, int64_t* square) {
  constexpr int64_t kBlock = Moments<B>::kMost * B::N;
  const auto flips = B::set1(flip);
  *sum = *square = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock, whole = count / B::N * B::N;
    Moments<B> block;
    for (int64_t i = 0; i < whole; i += B::N) block.add(B::flip(B::load(x + begin + i), flips));
    block.for_each([&](int64_t, int64_t s, int64_t q) {
      *sum += s;
      *square += q;
    });
    for (int64_t i = whole; i < count; ++i) {
      const int64_t value = x[begin + i] ^ flip;
      *sum += value;
      *square += value * value;
    }
  }
}

template <class B>
void normalize(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns, const Operand& of_x,
               float center, float factor, const float* gain, const float* bias, const Output& output) {
  using F = typename B::Floats;
  const OperandOf<B> of(of_x);
  const OutputOf<B> to(output);
  const auto middle = F::set1(center), scale = F::set1(factor);
  // B::N elements, from arrays that have that many.
  const auto vector = [&](const uint8_t* from, const float* g, const float* b) {
    typename F::Reg y[B::kParts];
    B::load_centered(from, of.flip, of.center, y);
    for (int k = 0; k < B::kParts; ++k) {
      const auto normal = F::mul(F::sub(y[k], middle), scale);
      y[k] = F::add(F::mul(normal, F::load(g + k * F::N)), F::load(b + k * F::N));
    }
    return to.value_in_order(y);
  };
  const int64_t left = columns % B::N, whole = columns - left;
  float last_gain[B::N] = {}, last_bias[B::N] = {};
  __builtin_memcpy(last_gain, gain + whole, left * sizeof(float));
  __builtin_memcpy(last_bias, bias + whole, left * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* const from = x.data + r * x.stride;
    uint8_t* const at = out.data + r * out.stride;
    for (int64_t i = 0; i < whole; i += B::N) B::store(at + i, vector(from + i, gain + i, bias + i));
    if (left > 0) {
      uint8_t last[B::N];
      B::store(last, B::load_some(from + whole, left));
      B::store_some(at + whole, vector(last, last_gain, last_bias), left);
    }
  }
}

template <class B>
constexpr NormKernels norm_table() {
  static_assert(has_bytes_interface<B>(), "see bytes.h");
  return {moments_of_columns<B>, moments<B>, normalize<B>};
}

}  // namespace
}  // namespace fastquant
