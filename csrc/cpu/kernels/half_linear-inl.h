// Linear layers with fp16 weights on fp32 rows, computed in fp32.
#pragma once

#include "../kernels.h"
#include "../quantized/kernels/unrolled-inl.h"

namespace fastquant {
namespace {

// Every product is summed up in one of so many sums, that of its index, so that all instruction sets round the
// same sums. They are added in pairs at the end.
constexpr int kSumsOfProduct = 16;

// Rows and outputs of a tile, so that its sums stay in registers.
template <class V>
constexpr int kTileSide = V::N == kSumsOfProduct ? 4
                          : V::N == 1            ? 1
                                                 : 2;

// Sums of the products of kRows rows with the weights of kOutputs outputs, for whole vectors of inputs.
template <class V, int kRows, int kOutputs>
FASTQUANT_INLINE void add_products(const float* const (&x)[kRows], const Half* const (&w)[kOutputs],
                                   int64_t inputs,
                                   typename V::Reg (&sums)[kRows * kOutputs][kSumsOfProduct / V::N]) {
  for (int64_t i = 0; i < inputs; i += kSumsOfProduct) {
    unrolled<kSumsOfProduct / V::N>([&](auto part) FASTQUANT_INLINE_LAMBDA {
      typename V::Reg weights[kOutputs];
      unrolled<kOutputs>([&](auto o) FASTQUANT_INLINE_LAMBDA { weights[o] = V::load(w[o] + i + part * V::N); });
      unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
        const auto values = V::load(x[r] + i + part * V::N);
        unrolled<kOutputs>([&](auto o) FASTQUANT_INLINE_LAMBDA {
          auto& sum = sums[r * kOutputs + o][part];
          sum = V::madd(values, weights[o], sum);
        });
      });
    });
  }
}

// Leaves the sum of all of them in the first. Loops of a known length are vectorized.
template <int kHalf = kSumsOfProduct / 2>
FASTQUANT_INLINE void add_pairs(float (&sums)[kSumsOfProduct]) {
  for (int k = 0; k < kHalf; ++k) sums[k] += sums[k + kHalf];
  if constexpr (kHalf > 1) add_pairs<kHalf / 2>(sums);
}

template <class V, int kRows, int kOutputs>
void half_tile(const HalfLinear& layer, int64_t row, int64_t output) {
  constexpr int kParts = kSumsOfProduct / V::N, kTile = kRows * kOutputs;
  typename V::Reg sums[kTile][kParts];
  unrolled<kTile>([&](auto t) FASTQUANT_INLINE_LAMBDA {
    unrolled<kParts>([&](auto part) FASTQUANT_INLINE_LAMBDA { sums[t][part] = V::set1(0.0f); });
  });
  const float* x[kRows];
  const Half* w[kOutputs];
  for (int r = 0; r < kRows; ++r) x[r] = layer.x + (row + r) * layer.inputs;
  for (int o = 0; o < kOutputs; ++o) w[o] = layer.weight + (output + o) * layer.inputs;
  const int64_t left = layer.inputs % kSumsOfProduct, whole = layer.inputs - left;
  add_products<V, kRows, kOutputs>(x, w, whole, sums);
  if (left > 0) {
    float last_x[kRows][kSumsOfProduct] = {};
    Half last_w[kOutputs][kSumsOfProduct] = {};
    for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(last_x[r], x[r] + whole, left * sizeof(float));
      x[r] = last_x[r];
    }
    for (int o = 0; o < kOutputs; ++o) {
      __builtin_memcpy(last_w[o], w[o] + whole, left * sizeof(Half));
      w[o] = last_w[o];
    }
    add_products<V, kRows, kOutputs>(x, w, kSumsOfProduct, sums);
  }
  float pairs[kTile][kSumsOfProduct];
  unrolled<kTile>([&](auto t) FASTQUANT_INLINE_LAMBDA {
    unrolled<kParts>([&](auto part)
                         FASTQUANT_INLINE_LAMBDA { V::store(pairs[t] + part * V::N, sums[t][part]); });
  });
  for (int t = 0; t < kTile; ++t) add_pairs(pairs[t]);
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOutputs; ++o) {
      const float bias = layer.bias == nullptr ? 0.0f : layer.bias[output + o];
      const float y = pairs[r * kOutputs + o][0] + bias;
      layer.y[(row + r) * layer.outputs + output + o] = layer.relu && y < 0.0f ? 0.0f : y;
    }
  }
}

// All rows, for kOutputs outputs.
template <class V, int kOutputs>
void half_rows(const HalfLinear& layer, int64_t output, int64_t begin, int64_t end) {
  constexpr int kSide = kTileSide<V>;
  for (; begin + kSide <= end; begin += kSide) half_tile<V, kSide, kOutputs>(layer, begin, output);
  if constexpr (kSide > 1) {
    for (; begin < end; ++begin) half_tile<V, 1, kOutputs>(layer, begin, output);
  }
}

template <class V>
void half_linear(const HalfLinear& layer, int64_t first, int64_t last) {
  // The weights of so many outputs stay in the L2 cache while they meet all rows.
  constexpr int64_t kBytesOfWeights = 131072, kSide = kTileSide<V>;
  const int64_t fitting = kBytesOfWeights / (static_cast<int64_t>(sizeof(Half)) * layer.inputs + 1);
  const int64_t at_once = fitting < 16 ? 16 : fitting / 16 * 16;
  for (; first < last; first += at_once) {
    const int64_t end = first + at_once < last ? first + at_once : last;
    for (int64_t row = 0; row < layer.rows; row += kSide) {
      const int64_t rows = layer.rows - row < kSide ? layer.rows - row : kSide;
      int64_t output = first;
      for (; output + kSide <= end; output += kSide) half_rows<V, kSide>(layer, output, row, row + rows);
      if constexpr (kSide > 1) {
        for (; output < end; ++output) half_rows<V, 1>(layer, output, row, row + rows);
      }
    }
  }
}

}  // namespace
}  // namespace fastquant
