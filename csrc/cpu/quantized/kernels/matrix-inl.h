// The matrix kernel: rows of values times packed weights (../packing.h), and the output stage. Everything here
// is in an anonymous namespace, and std:: is not used: see ../../kernels-inl.h.
//
// D, the instructions for products, has the interface of L (output-inl.h), whose vectors hold one sum for each
// of N channels, and
//   kValueOffset                what its products subtract from each value (MatrixKernels::value_offset)
//   kMostVectors                vectors of channels in the widest tile
//   kMostRows<V>                rows in the tallest tile that is V vectors wide
//   kSums                       sums that are enough to hide the latency of a product
//   Values, Weights
//   values(p)                   four values, for every channel
//   weights(p)                  four weights of each of N channels
//   dot(sums, values, weights)  adds the products
#pragma once

#include "../matrix_kernels.h"
#include "../packing.h"
#include "output-inl.h"

namespace fastquant {
namespace {

// The most independent sums of each output that a tile of so many sums should have: a power of two.
constexpr int parallel_sums(int sums, int enough) {
  int parallel = 1;
  while (parallel < 4 && sums * parallel * 2 <= enough) parallel *= 2;
  return parallel;
}

// Weights that are read once come from far away.
constexpr int kWeightsAhead = 1024;

// The outputs of kRows rows from `row` on for kVectors vectors of channels from `channel` on. weights: the
// first step of these channels; from step to step it is `width` bytes.
template <class D, int kRows, int kVectors>
void multiply_tile(const MatrixRows& a, int64_t row, const int8_t* weights, int64_t width,
                   const int64_t* first_steps, const OutputStage& out, int64_t channel, int64_t count) {
  constexpr int kTile = kRows * kVectors, kParallel = parallel_sums(kTile, D::kSums);
  typename D::Ints sums[kParallel][kTile];
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
    const auto offset = D::load(out.offset + channel + v * D::N);
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA { sums[0][r * kVectors + v] = offset; });
  });
  unrolled<kParallel - 1>([&](auto k) FASTQUANT_INLINE_LAMBDA {
    unrolled<kTile>([&](auto i) FASTQUANT_INLINE_LAMBDA { sums[k + 1][i] = D::set1(int32_t{0}); });
  });
  const int8_t* w = weights;
  for (int64_t segment = 0; segment < a.segments; ++segment) {
    const uint8_t* p[kRows];
    unrolled<kRows>(
        [&](auto r) FASTQUANT_INLINE_LAMBDA { p[r] = a.pointers[segment * a.stride + row + r] + a.offset; });
    if (first_steps != nullptr) w = weights + first_steps[segment] * width;
    const auto step = [&](int64_t k, typename D::Ints(&into)[kTile]) FASTQUANT_INLINE_LAMBDA {
      typename D::Weights these[kVectors];
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        these[v] = D::weights(w + v * (D::N * kStep));
        if constexpr (kRows == 1) __builtin_prefetch(w + v * (D::N * kStep) + kWeightsAhead);
      });
      unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
        const auto values = D::values(p[r] + kStep * k);
        unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
          into[r * kVectors + v] = D::dot(into[r * kVectors + v], values, these[v]);
        });
      });
      w += width;
    };
    int64_t k = 0;
    if constexpr (kParallel > 1) {
      for (; k + kParallel <= a.steps; k += kParallel) {
        unrolled<kParallel>([&](auto u) FASTQUANT_INLINE_LAMBDA { step(k + u, sums[u]); });
      }
    }
    for (; k < a.steps; ++k) step(k, sums[0]);
  }
  unrolled<kParallel - 1>([&](auto k) FASTQUANT_INLINE_LAMBDA {
    unrolled<kTile>([&](auto i) FASTQUANT_INLINE_LAMBDA { sums[0][i] = D::add(sums[0][i], sums[k + 1][i]); });
  });
  finish_rows<D, kRows, kVectors>(sums[0], row, channel, count, out);
}

using Tile = void (*)(const MatrixRows&, int64_t, const int8_t*, int64_t, const int64_t*, const OutputStage&,
                      int64_t, int64_t);

// Calls the tile of `rows` rows.
template <class D, int kVectors, int kRows = D::template kMostRows<kVectors>>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<D, kVectors, kRows - 1>(rows);
  }
  return multiply_tile<D, kRows, kVectors>;
}

// All rows, for kVectors vectors of channels.
template <class D, int kVectors>
void multiply_channels(const MatrixRows& a, const int8_t* weights, int64_t width, const int64_t* first_steps,
                       const OutputStage& out, int64_t channel, int64_t count) {
  constexpr int kMost = D::template kMostRows<kVectors>;
  for (int64_t row = 0; row < a.rows;) {
    const int64_t left = a.rows - row;
    int64_t rows = left < kMost ? left : kMost;
    if (left > kMost && left < 2 * kMost) rows = (left + 1) / 2;  // two tiles of a size, not a tiny one
    tile_of<D, kVectors>(rows)(a, row, weights, width, first_steps, out, channel, count);
    row += rows;
  }
}

template <class D, int kVectors = D::kMostVectors>
void multiply_at_most(int64_t vectors, const MatrixRows& a, const int8_t* weights, int64_t width,
                      const int64_t* first_steps, const OutputStage& out, int64_t channel, int64_t count) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      multiply_at_most<D, kVectors - 1>(vectors, a, weights, width, first_steps, out, channel, count);
      return;
    }
  }
  multiply_channels<D, kVectors>(a, weights, width, first_steps, out, channel, count);
}

template <class D>
void multiply(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
              const OutputStage& out) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockChannels, width = block_channels(weights.channels, block) * kStep;
    const int64_t channels =
        weights.channels - first < kBlockChannels ? weights.channels - first : kBlockChannels;
    const int8_t* const data = weights.data + first * weights.steps * kStep;
    constexpr int64_t kMost = D::kMostVectors * D::N;
    for (int64_t c = 0; c < channels; c += kMost) {
      const int64_t count = channels - c < kMost ? channels - c : kMost;
      multiply_at_most<D>((count + D::N - 1) / D::N, a, data + c * kStep, width, weights.first_steps, out,
                          first + c, count);
    }
  }
}

template <class D>
constexpr MatrixKernels matrix_table() {
  return {D::kValueOffset, multiply<D>};
}

}  // namespace
}  // namespace fastquant
