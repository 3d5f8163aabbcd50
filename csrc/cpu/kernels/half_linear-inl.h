// Linear layers with fp16 weights on fp32 rows, computed in fp32.
//
// Each output is one chain of fused multiplications and additions, from its first input to its last, whatever
// the tile: so results are the same on every instruction set and for any number of rows.
#pragma once

#include "../kernels.h"
#include "../quantized/kernels/unrolled-inl.h"

namespace fastquant {
namespace {

// The tallest tile of so many panels whose sums stay in registers, beside the weights of one input.
template <class V, int kPanels>
constexpr int kMostHalfRows = V::N == kHalfPanel         ? 6
                              : V::N == 1 || kPanels > 1 ? 1
                                                         : 6;

// The panels of one row, and of several rows.
constexpr int kWidestHalfTile = 4;
template <class V>
constexpr int kHalfPanelsOfRows = V::N == kHalfPanel ? kWidestHalfTile : 1;

template <class V, int kRows, int kPanels>
void half_tile(const HalfLinear& layer, int64_t row, int64_t output) {
  constexpr int kParts = kHalfPanel / V::N, kVectors = kPanels * kParts;
  typename V::Reg sums[kRows * kVectors];
  unrolled<kRows * kVectors>([&](auto i) FASTQUANT_INLINE_LAMBDA { sums[i] = V::set1(0.0f); });
  const Half* const w = layer.weight + output * layer.inputs;
  const float* const x = layer.x + row * layer.inputs;
  const int64_t panel = kHalfPanel * layer.inputs;
  for (int64_t i = 0; i < layer.inputs; ++i) {
    typename V::Reg weights[kVectors];
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      weights[v] = V::load(w + v / kParts * panel + i * kHalfPanel + v % kParts * V::N);
    });
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      const auto value = V::set1(x[r * layer.inputs + i]);
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        auto& sum = sums[r * kVectors + v];
        sum = V::madd(value, weights[v], sum);
      });
    });
  }
  float results[kRows][kPanels * kHalfPanel];
  unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>(
        [&](auto v) FASTQUANT_INLINE_LAMBDA { V::store(results[r] + v * V::N, sums[r * kVectors + v]); });
  });
  const int64_t left = layer.outputs - output,
                count = left < kPanels * kHalfPanel ? left : kPanels * kHalfPanel;
  for (int r = 0; r < kRows; ++r) {
    float* const to = layer.y + (row + r) * layer.outputs + output;
    for (int64_t o = 0; o < count; ++o) {
      const float y = results[r][o] + (layer.bias == nullptr ? 0.0f : layer.bias[output + o]);
      to[o] = layer.relu && y < 0.0f ? 0.0f : y;
    }
  }
}

// Calls the tile of `rows` rows.
template <class V, int kPanels, int kRows = kMostHalfRows<V, kPanels>>
void half_tile_of(int64_t rows, const HalfLinear& layer, int64_t row, int64_t output) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return half_tile_of<V, kPanels, kRows - 1>(rows, layer, row, output);
  }
  half_tile<V, kRows, kPanels>(layer, row, output);
}

// The rows [begin, end), in tiles of nearly the same size.
template <class V, int kPanels>
void half_rows(const HalfLinear& layer, int64_t begin, int64_t end, int64_t output) {
  constexpr int64_t kMost = kMostHalfRows<V, kPanels>;
  for (int64_t tiles = (end - begin + kMost - 1) / kMost; tiles > 0; --tiles) {
    const int64_t rows = (end - begin) / tiles;
    half_tile_of<V, kPanels>(rows, layer, begin, output);
    begin += rows;
  }
}

// The panels that begin at the outputs [first, last), in tiles of at most kPanels.
template <class V, int kPanels>
void half_panels(const HalfLinear& layer, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (; first + (kPanels - 1) * kHalfPanel < last; first += kPanels * kHalfPanel) {
    half_rows<V, kPanels>(layer, begin, end, first);
  }
  if constexpr (kPanels > 1) {
    if (first < last) half_panels<V, kPanels - 1>(layer, begin, end, first, last);
  }
}

template <class V>
void half_linear(const HalfLinear& layer, int64_t begin, int64_t end, int64_t first, int64_t last) {
  if (end - begin == 1) {
    half_panels<V, kWidestHalfTile>(layer, begin, end, first, last);
  } else {
    half_panels<V, kHalfPanelsOfRows<V>>(layer, begin, end, first, last);
  }
}

}  // namespace
}  // namespace fastquant
