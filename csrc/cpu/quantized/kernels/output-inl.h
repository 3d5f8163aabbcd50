// The output stage of a layer (../output.h) for vectors of sums.
//
// L, the type of the vectors:
//   N                           elements of a vector
//   Ints, Floats                vectors of int32 and of fp32
//   load(p), store(p, x)        int32 and fp32, unaligned
//   set1(x)                     of either type
//   add(Ints, Ints)             wraps around
//   to_floats(Ints)             rounded
//   to_ints(Floats)             rounded half to even; finite and within int32
//   mul, add, min, max(Floats, Floats)   min and max give the second where either is NaN
//   store_bytes<M>(p, Ints (&x)[M], flip)      M N bytes from integers in 0 ... 255, each xor flip
//   store_bfloat16(p, Floats)   rounded half to even
#pragma once

#include "../output.h"
#include "unrolled-inl.h"

namespace fastquant {
namespace {

template <class L>
FASTQUANT_INLINE typename L::Ints output_integers(typename L::Ints sums, typename L::Floats factor,
                                                  typename L::Floats bias, const OutputStage& out) {
  const auto y = L::add(L::mul(L::to_floats(sums), factor), bias);
  const auto bounded = L::min(L::max(y, L::set1(out.low)), L::set1(out.high));
  return L::add(L::to_ints(bounded), L::set1(out.zero_point));
}

template <class L>
FASTQUANT_INLINE typename L::Floats output_floats(typename L::Ints sums, typename L::Floats factor,
                                                  typename L::Floats bias, const OutputStage& out) {
  const auto y = L::add(L::mul(L::to_floats(sums), factor), bias);
  return L::min(L::set1(out.high), L::max(L::set1(out.low), y));
}

// The output of `count` channels of one row, from `channel` on. `sums` has whole vectors of them, and so have
// the arrays of `out`. For what is not worth a way of its own: floating-point results, and channels that fill
// no vector.
template <class L>
__attribute__((noinline)) void finish_row(const int32_t* sums, int64_t row, int64_t channel, int64_t count,
                                          const OutputStage& out) {
  const int64_t first = row * out.stride + channel;
  const int64_t bytes = bytes_of(out.type);
  for (int64_t c = 0; c < count; c += L::N) {
    const auto sum = L::load(sums + c);
    const auto factor = L::load(out.factor + channel + c), bias = L::load(out.bias + channel + c);
    alignas(64) char result[4 * L::N];
    if (bytes == 1) {
      const typename L::Ints q[1] = {output_integers<L>(sum, factor, bias, out)};
      L::template store_bytes<1>(reinterpret_cast<uint8_t*>(result), q, out.flip);
    } else if (bytes == 2) {
      L::store_bfloat16(reinterpret_cast<uint16_t*>(result), output_floats<L>(sum, factor, bias, out));
    } else {
      L::store(reinterpret_cast<float*>(result), output_floats<L>(sum, factor, bias, out));
    }
    const int64_t valid = (count - c < L::N ? count - c : L::N) * bytes;
    char* const to = static_cast<char*>(out.data) + (first + c) * bytes;
    if (valid == L::N * bytes) {
      __builtin_memcpy(to, result, L::N * bytes);
    } else {
      for (int64_t i = 0; i < valid; ++i) to[i] = result[i];
    }
  }
}

// The outputs of kRows rows from `row` on, for kVectors vectors of channels from `channel` on, of which `count`
// channels exist. sums[r * kVectors + v] is vector v of row r.
template <class L, int kRows, int kVectors>
FASTQUANT_INLINE void finish_rows(const typename L::Ints (&sums)[kRows * kVectors], int64_t row,
                                  int64_t channel, int64_t count, const OutputStage& out) {
  if (bytes_of(out.type) == 1 && count == kVectors * L::N) {
    typename L::Floats factor[kVectors], bias[kVectors];
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      factor[v] = L::load(out.factor + channel + v * L::N);
      bias[v] = L::load(out.bias + channel + v * L::N);
    });
    uint8_t* const to = static_cast<uint8_t*>(out.data) + row * out.stride + channel;
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      typename L::Ints q[kVectors];
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        q[v] = output_integers<L>(sums[r * kVectors + v], factor[v], bias[v], out);
      });
      L::template store_bytes<kVectors>(to + r * out.stride, q, out.flip);
    });
    return;
  }
  alignas(64) int32_t stored[kRows * kVectors * L::N];
  unrolled<kRows * kVectors>([&](auto i) FASTQUANT_INLINE_LAMBDA { L::store(stored + i * L::N, sums[i]); });
  for (int r = 0; r < kRows; ++r) finish_row<L>(stored + r * kVectors * L::N, row + r, channel, count, out);
}

}  // namespace
}  // namespace fastquant
