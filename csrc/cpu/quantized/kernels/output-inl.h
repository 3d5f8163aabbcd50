// The output stage of a layer (../output.h) for vectors of sums.
//
// L, the type of the vectors:
//   N                           elements of a vector
//   Ints, Floats                vectors of int32 and of fp32
//   load(p), store(p, x)        int32 and fp32, unaligned
//   set1(x)                     of either type
//   add(Ints, Ints)             wraps around
//   to_floats(Ints)             rounded
//   to_ints(Floats)             rounded half to even; of at most 2^31 - 129, and -2^31 below -2^31
//   mul, add, min, max(Floats, Floats)   min and max give the second where either is NaN
//   Limits, limits(zero_point, low, flip)
//   store_bytes<M>(p, Ints (&x)[M], limits, count)   max(x + zero_point, low), which is 255 at most, as bytes,
//   each
//                               xor flip, for the first `count` elements of M vectors, more than M - 1 vectors
//   store_bfloat16(p, Floats)   rounded half to even
#pragma once

#include <cstring>
#include <type_traits>

#include "../output.h"
#include "unrolled-inl.h"

namespace fastquant {
namespace {

template <class L>
FASTQUANT_INLINE typename L::Floats scaled(typename L::Ints sums, typename L::Floats factor,
                                           typename L::Floats bias) {
  return L::add(L::mul(L::to_floats(sums), factor), bias);
}

template <class L>
FASTQUANT_INLINE typename L::Floats bounded(typename L::Floats y, const OutputStage& out) {
  return L::min(L::set1(out.high), L::max(L::set1(out.low), y));
}

// The outputs in fp32 or bf16 of `count` channels of one row, from `channel` on. `sums` has whole vectors of
// them, and so have the arrays of `out`.
template <class L>
__attribute__((noinline)) void finish_floating(const int32_t* sums, int64_t row, int64_t channel, int64_t count,
                                               const OutputStage& out) {
  const auto finish = [&](auto* to, const auto& store) FASTQUANT_INLINE_LAMBDA {
    to += row * out.stride + channel;
    for (int64_t c = 0; c < count; c += L::N) {
      const auto y = bounded<L>(
          scaled<L>(L::load(sums + c), L::load(out.factor + channel + c), L::load(out.bias + channel + c)),
          out);
      if (count - c >= L::N) {
        store(to + c, y);
      } else {
        std::remove_pointer_t<decltype(to)> result[L::N];
        store(result, y);
        std::memcpy(to + c, result, static_cast<size_t>(count - c) * sizeof *to);
      }
    }
  };
  if (out.type == OutputType::f32) {
    finish(static_cast<float*>(out.data), [](float* to, typename L::Floats y) { L::store(to, y); });
  } else {
    finish(static_cast<uint16_t*>(out.data),
           [](uint16_t* to, typename L::Floats y) { L::store_bfloat16(to, y); });
  }
}

// The outputs of kRows rows from `row` on, for kVectors vectors of channels from `channel` on, of which `count`
// channels exist. sums[r * kVectors + v] is vector v of row r.
template <class L, int kRows, int kVectors>
FASTQUANT_INLINE void finish_rows(const typename L::Ints (&sums)[kRows * kVectors], int64_t row,
                                  int64_t channel, int64_t count, const OutputStage& out) {
  if (bytes_of(out.type) == 1) {
    typename L::Floats factor[kVectors], bias[kVectors];
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      factor[v] = L::load(out.factor + channel + v * L::N);
      bias[v] = L::load(out.bias + channel + v * L::N);
    });
    const auto high = L::set1(out.high);
    const auto low = static_cast<uint8_t>(static_cast<int32_t>(out.low) + out.zero_point);
    const auto limits = L::limits(out.zero_point, low, out.flip);
    uint8_t* const to = static_cast<uint8_t*>(out.data) + row * out.stride + channel;
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      typename L::Ints q[kVectors];
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        q[v] = L::to_ints(L::min(scaled<L>(sums[r * kVectors + v], factor[v], bias[v]), high));
      });
      L::template store_bytes<kVectors>(to + r * out.stride, q, limits, count);
    });
    return;
  }
  alignas(64) int32_t stored[kRows * kVectors * L::N];
  unrolled<kRows * kVectors>([&](auto i) FASTQUANT_INLINE_LAMBDA { L::store(stored + i * L::N, sums[i]); });
  if (out.type == OutputType::f32 && count == kVectors * L::N) {
    typename L::Floats factor[kVectors], bias[kVectors];
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      factor[v] = L::load(out.factor + channel + v * L::N);
      bias[v] = L::load(out.bias + channel + v * L::N);
    });
    float* to = static_cast<float*>(out.data) + row * out.stride + channel;
    const int32_t* of_row = stored;
    // Not unrolled, either: few layers have such outputs, and every tile would take longer to compile.
#pragma GCC unroll 1
    for (int r = 0; r < kRows; ++r, to += out.stride, of_row += kVectors * L::N) {
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        L::store(to + v * L::N, bounded<L>(scaled<L>(L::load(of_row + v * L::N), factor[v], bias[v]), out));
      });
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    finish_floating<L>(stored + r * kVectors * L::N, row + r, channel, count, out);
  }
}

}  // namespace
}  // namespace fastquant
