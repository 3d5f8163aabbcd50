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
//   kMostSpread                 groups of so many channels, at most N, take group_values
//   group_values<C>(p, k)       for each channel, the k-th four values of its group of C; p points at N values,
//   those
//                               of the first group first
//
// Where products need bytes as 16-bit words, D may also have
//   Wide                        the same for what these have written: words, two for every byte of four
//   WithWideWeights             the same for words of weights, those of even bytes of 4 N first, and for bytes
//   SmallPairs                  the same for bytes as they are, whose pairs add up to 256 at most
//   has_small_pairs(p, n)       whether those of 4 n bytes do
//   widen_values, widen_weights(p, even, odd)   4 N bytes as the words of the first and third of each four, and
//                               of the others; 4 N bytes each
//   widen_some_values(p, n, even, odd)   the same, reading 4 n < 4 N bytes; what the rest becomes does not
//   matter
#pragma once

#include "../../kernels/prefetch-inl.h"
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
constexpr int kWeightsAhead = 4096;
constexpr int64_t kCacheLine = 64;

template <class D, int kRows, int kVectors>
FASTQUANT_INLINE void start_sums(typename D::Ints (&sums)[kRows * kVectors], int64_t channel,
                                 const OutputStage& out) {
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
    const auto offset = D::load(out.offset + channel + v * D::N);
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA { sums[r * kVectors + v] = offset; });
  });
}

// The outputs of kRows rows from `row` on for kVectors vectors of channels from `channel` on. weights: the
// first step of these channels; from step to step it is `width` bytes. ahead: weights of which a cache line is
// fetched at each step.
template <class D, int kRows, int kVectors>
void multiply_tile(const MatrixRows& a, int64_t row, const int8_t* weights, int64_t width,
                   const int64_t* first_steps, const int8_t* ahead, const OutputStage& out, int64_t channel,
                   int64_t count) {
  constexpr int kTile = kRows * kVectors, kParallel = parallel_sums(kTile, D::kSums);
  typename D::Ints sums[kParallel][kTile];
  start_sums<D, kRows, kVectors>(sums[0], channel, out);
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
      if constexpr (kRows > 1) {
        __builtin_prefetch(ahead);
        ahead += kCacheLine;
      }
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

using Tile = void (*)(const MatrixRows&, int64_t, const int8_t*, int64_t, const int64_t*, const int8_t*,
                      const OutputStage&, int64_t, int64_t);

// Calls the tile of `rows` rows.
template <class D, int kVectors, int kRows = D::template kMostRows<kVectors>>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<D, kVectors, kRows - 1>(rows);
  }
  return multiply_tile<D, kRows, kVectors>;
}

// All rows, for kVectors vectors of channels. next: weights that will be multiplied later, as many as these;
// nullptr if there are none.
template <class D, int kVectors>
void multiply_channels(const MatrixRows& a, const int8_t* weights, int64_t width, const int64_t* first_steps,
                       const int8_t* next, const OutputStage& out, int64_t channel, int64_t count) {
  constexpr int kMost = D::template kMostRows<kVectors>;
  const int64_t steps = a.segments * a.steps;
  const int8_t* const end = next + (next != nullptr ? steps * kVectors * D::N * kStep : 0);
  for (int64_t row = 0; row < a.rows;) {
    const int64_t left = a.rows - row;
    int64_t rows = left < kMost ? left : kMost;
    if (left > kMost && left < 2 * kMost) rows = (left + 1) / 2;  // two tiles of a size, not a tiny one
    // When the next weights are there, tiles fetch what they read anyway. What is never read must not be
    // fetched: it would take the place of all else in the caches.
    const bool more = next < end;
    tile_of<D, kVectors>(rows)(a, row, weights, width, first_steps, more ? next : weights, out, channel, count);
    if (more) next += steps * kCacheLine;
    row += rows;
  }
}

template <class D, int kVectors = D::kMostVectors>
void multiply_at_most(int64_t vectors, const MatrixRows& a, const int8_t* weights, int64_t width,
                      const int64_t* first_steps, const int8_t* next, const OutputStage& out, int64_t channel,
                      int64_t count) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      multiply_at_most<D, kVectors - 1>(vectors, a, weights, width, first_steps, next, out, channel, count);
      return;
    }
  }
  multiply_channels<D, kVectors>(a, weights, width, first_steps, next, out, channel, count);
}

// Calls f(channel, count, weights, width) for each part of the blocks that is kMost channels wide.
template <int64_t kMost, class F>
FASTQUANT_INLINE void for_tiles_of_channels(const MatrixWeights& weights, int64_t begin, int64_t end,
                                            const F& f) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockChannels, width = block_channels(weights.channels, block) * kStep;
    const int64_t channels =
        weights.channels - first < kBlockChannels ? weights.channels - first : kBlockChannels;
    const int8_t* const data = weights.data + first * weights.steps * kStep;
    for (int64_t c = 0; c < channels; c += kMost) {
      f(first + c, channels - c < kMost ? channels - c : kMost, data + c * kStep, width);
    }
  }
}

// The same for tiles that are kVectors vectors of channels wide.
template <class D, int kVectors>
void multiply_in_tiles(const MatrixRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
                       const OutputStage& out) {
  for_tiles_of_channels<kVectors * D::N>(
      weights, begin, end, [&](int64_t channel, int64_t count, const int8_t* data, int64_t width) {
        // Each part of a block fetches as large a part of the next one.
        const int64_t next_block = rounded_up(channel + 1, kBlockChannels);
        const int8_t* const next =
            weights.data + (next_block + channel % kBlockChannels) * weights.steps * kStep;
        multiply_at_most<D, kVectors>(
            (count + D::N - 1) / D::N, rows, data, width, weights.first_steps,
            next_block < smaller(end * kBlockChannels, weights.channels) ? next : nullptr, out, channel, count);
      });
}

template <class D>
void multiply(const MatrixRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
              const OutputStage& out, void*) {
  // Few rows: weights, which come from far away, are read once where a narrower tile has all rows.
  if constexpr (D::kMostVectors == 4) {
    constexpr int kOfWide = D::template kMostRows<4>, kOfNarrow = D::template kMostRows<2>;
    if (kOfWide < rows.rows && rows.rows <= kOfNarrow)
      return multiply_in_tiles<D, 2>(rows, weights, begin, end, out);
  }
  multiply_in_tiles<D, D::kMostVectors>(rows, weights, begin, end, out);
}

// ----------------------------------------------------------------------------------------- groups

// As multiply_tile, for groups of kGroup channels. A weight takes kWeightBytes bytes.
template <class D, int kGroup, int kWeightBytes, int kRows, int kVectors>
void multiply_tile_of_groups(const MatrixRows& a, int64_t row, const int8_t* weights, int64_t width,
                             const OutputStage& out, int64_t channel, int64_t count) {
  constexpr int kSteps = kGroup / kStep;
  typename D::Ints sums[kRows * kVectors];
  start_sums<D, kRows, kVectors>(sums, channel, out);
  const int64_t first_value = a.offset + channel / kGroup * kGroup;
  for (int64_t segment = 0; segment < a.segments; ++segment, weights += kSteps * width * kWeightBytes) {
    const uint8_t* p[kRows];
    unrolled<kRows>(
        [&](auto r) FASTQUANT_INLINE_LAMBDA { p[r] = a.pointers[segment * a.stride + row + r] + first_value; });
    if constexpr (kGroup <= D::kMostSpread) {  // all values of a row at once, which are loaded once
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        constexpr int kChannel = v * D::N;
        typename D::Weights these[kSteps];
        unrolled<kSteps>([&](auto k) FASTQUANT_INLINE_LAMBDA {
          these[k] = D::weights(weights + kWeightBytes * (kChannel * kStep + k * width));
        });
        unrolled<kRows * kSteps>([&](auto i) FASTQUANT_INLINE_LAMBDA {
          constexpr int kRow = i / kSteps, k = i % kSteps;
          auto& sum = sums[kRow * kVectors + v];
          sum = D::dot(sum, D::template group_values<kGroup>(p[kRow] + kChannel, k), these[k]);
        });
      });
    } else {
      constexpr int kOfGroup = kGroup / D::N < kVectors ? kGroup / D::N : kVectors;
      unrolled<kVectors / kOfGroup * kSteps>([&](auto i) FASTQUANT_INLINE_LAMBDA {
        constexpr int kInTile = i / kSteps, k = i % kSteps, kFirst = kInTile * kOfGroup;
        typename D::Weights these[kOfGroup];
        unrolled<kOfGroup>([&](auto v) FASTQUANT_INLINE_LAMBDA {
          these[v] = D::weights(weights + kWeightBytes * ((kFirst + v) * D::N * kStep + k * width));
        });
        unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
          const auto values = D::values(p[r] + kInTile * kGroup + k * kStep);
          unrolled<kOfGroup>([&](auto v) FASTQUANT_INLINE_LAMBDA {
            auto& sum = sums[r * kVectors + kFirst + v];
            sum = D::dot(sum, values, these[v]);
          });
        });
      });
    }
  }
  finish_rows<D, kRows, kVectors>(sums, row, channel, count, out);
}

// All rows, for kVectors vectors of channels: kMost at once, then fewer.
template <class D, int kGroup, int kWeightBytes, int kVectors,
          int kMost = D::template kMostRows<D::kMostVectors>>
void multiply_rows_of_groups(const MatrixRows& a, int64_t row, const int8_t* weights, int64_t width,
                             const OutputStage& out, int64_t channel, int64_t count) {
  for (; row + kMost <= a.rows; row += kMost) {
    multiply_tile_of_groups<D, kGroup, kWeightBytes, kMost, kVectors>(a, row, weights, width, out, channel,
                                                                      count);
  }
  if constexpr (kMost > 1) {
    multiply_rows_of_groups<D, kGroup, kWeightBytes, kVectors, kMost / 2>(a, row, weights, width, out, channel,
                                                                          count);
  }
}

// At most kMostVectors vectors of channels. Tiles are of two widths: the widest, and one lane of channels.
template <class D, int kGroup, int kWeightBytes>
void multiply_channels_of_groups(const MatrixRows& rows, const int8_t* weights, int64_t width,
                                 const OutputStage& out, int64_t channel, int64_t count) {
  constexpr int kMost = D::kMostVectors, kOfLane = kLaneChannels / D::N,
                kUnit = kOfLane < kMost ? kOfLane : kMost;
  if (count == kMost * D::N) {
    multiply_rows_of_groups<D, kGroup, kWeightBytes, kMost>(rows, 0, weights, width, out, channel, count);
    return;
  }
  for (int64_t c = 0; c < count; c += kUnit * D::N) {
    multiply_rows_of_groups<D, kGroup, kWeightBytes, kUnit>(rows, 0, weights + kWeightBytes * c * kStep, width,
                                                            out, channel + c, kUnit * D::N);
  }
}

template <class D, int kGroup>
void multiply_groups_of(const MatrixRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
                        const OutputStage& out) {
  for_tiles_of_channels<D::kMostVectors * D::N>(
      weights, begin, end, [&](int64_t channel, int64_t count, const int8_t* data, int64_t width) {
        multiply_channels_of_groups<D, kGroup, 1>(rows, data, width, out, channel, count);
      });
}

template <class D>
void multiply_groups(const MatrixRows& rows, const MatrixWeights& weights, int64_t channels, int64_t begin,
                     int64_t end, const OutputStage& out, void*) {
  if (channels == 4) return multiply_groups_of<D, 4>(rows, weights, begin, end, out);
  if (channels == 8) return multiply_groups_of<D, 8>(rows, weights, begin, end, out);
  multiply_groups_of<D, 16>(rows, weights, begin, end, out);
}

static inline int64_t no_scratch(int64_t, bool) { return 0; }

// ------------------------------------------------------------------------------------------ words
//
// Making words of bytes takes as long as multiplying them. For more than a few rows, the words are written to
// memory first: those of some rows, and those of the weights of one tile of channels, so that both are used
// many times. The words of even bytes and those of odd bytes are two segments, or one after the other.
//
// Bytes are multiplied as they are in rows whose pairs are small: two values of a pair, which an instruction
// multiplies and adds in 16 bits, add up to 256 at most, so that even weights of -128 cannot overflow.

// For fewer rows than this, words are made where they are used.
constexpr int64_t kFewRows = 8;

// From so many rows on whose pairs are small, these are multiplied apart from the rows that follow them.
constexpr int64_t kRowsOfSmallPairs = 24;

// Words of rows that should stay in the L2 cache, and how many rows there should be at least.
constexpr int64_t kBytesOfWords = 262144;
constexpr int64_t kLeastWideRows = 24;

// Words of the weights of a tile that stay in the L1 cache.
constexpr int64_t kWordsInFirstCache = 24576;

static inline int64_t wide_rows(int64_t steps) {
  const int64_t rows = kBytesOfWords / (2 * kStep * (steps > 0 ? steps : 1));
  return rows < kLeastWideRows ? kLeastWideRows : rows;
}

// Memory for the words of even, or odd, bytes of a row: whole vectors are written for every segment.
template <class D>
int64_t wide_bytes(int64_t steps) {
  return kStep * (steps + D::N);
}

template <class D>
int64_t widened_scratch(int64_t steps, bool in_groups) {
  if (in_groups) return 2 * kStep * steps * kBlockChannels;
  const int64_t row = 2 * (wide_bytes<D>(steps) + static_cast<int64_t>(sizeof(void*)));
  return wide_rows(steps) * row + 2 * kStep * steps * D::Wide::kMostVectors * D::N;
}

// How many rows from `first` on have small pairs in all their segments, in the bytes [begin, end) of each.
template <class D>
int64_t rows_of_small_pairs(const MatrixRows& a, int64_t first, int64_t begin, int64_t end) {
  for (int64_t r = first; r < a.rows; ++r) {
    for (int64_t s = 0; s < a.segments; ++s) {
      if (!D::has_small_pairs(a.pointers[s * a.stride + r] + a.offset + begin, (end - begin) / kStep))
        return r - first;
    }
  }
  return a.rows - first;
}

// The words of one row of a segment.
template <class D>
void widen_segment(const uint8_t* p, int64_t steps, uint8_t* even, uint8_t* odd) {
  int64_t k = 0;
  for (; k + D::N <= steps; k += D::N) D::widen_values(p + k * kStep, even + k * kStep, odd + k * kStep);
  if (k < steps) D::widen_some_values(p + k * kStep, steps - k, even + k * kStep, odd + k * kStep);
}

// At most wide_rows rows.
template <class D>
void multiply_words(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
                    const OutputStage& out, void* scratch) {
  const int64_t steps = a.segments * a.steps;
  // Where segments are whole vectors, even and odd words follow each other without a gap, as one segment.
  const bool whole = a.steps % D::N == 0;
  const int64_t bytes = whole ? kStep * steps : wide_bytes<D>(steps);
  const uint8_t** const pointers = static_cast<const uint8_t**>(scratch);
  uint8_t* const wide = reinterpret_cast<uint8_t*>(pointers + 2 * a.rows);
  uint8_t* const wide_weights = wide + a.rows * 2 * bytes;
  for (int64_t r = 0; r < a.rows; ++r) {
    pointers[r] = wide + r * 2 * bytes;
    pointers[a.rows + r] = pointers[r] + bytes;
    for (int64_t s = 0; s < a.segments; ++s) {
      uint8_t* const to = wide + r * 2 * bytes + s * a.steps * kStep;
      widen_segment<D>(a.pointers[s * a.stride + r] + a.offset, a.steps, to, to + bytes);
    }
  }
  const MatrixRows rows = {pointers, 0, a.rows, a.rows, whole ? 1 : 2, whole ? 2 * steps : steps};
  const auto multiply_channels = [&](int64_t channel, int64_t count, const int8_t* data, int64_t width) {
    const int64_t vectors = (count + D::N - 1) / D::N, wide_width = vectors * D::N * kStep;
    uint8_t *even = wide_weights, *odd = wide_weights + steps * wide_width;
    for (int64_t s = 0; s < a.segments; ++s) {
      const int64_t from = weights.first_steps != nullptr ? weights.first_steps[s] : s * a.steps;
      for (int64_t k = from; k < from + a.steps; ++k, even += wide_width, odd += wide_width) {
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t at = v * D::N * kStep;
          D::widen_weights(data + k * width + at, even + at, odd + at);
        }
      }
    }
    multiply_at_most<typename D::Wide>(vectors, rows, reinterpret_cast<const int8_t*>(wide_weights), wide_width,
                                       nullptr, nullptr, out, channel, count);
  };
  constexpr int64_t kWide = D::Wide::kMostVectors * D::N, kNarrow = 2 * D::N;
  if (2 * kStep * steps * kWide <= kWordsInFirstCache) {
    for_tiles_of_channels<kWide>(weights, begin, end, multiply_channels);
  } else {
    for_tiles_of_channels<kNarrow>(weights, begin, end, multiply_channels);
  }
}

template <class D>
void multiply_widened(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
                      const OutputStage& out, void* scratch) {
  const int64_t at_once = wide_rows(a.segments * a.steps);
  MatrixRows rows = a;
  OutputStage stage = out;
  for (int64_t first = 0; first < a.rows; first += rows.rows) {
    const int64_t left = a.rows - first, small = rows_of_small_pairs<D>(a, first, 0, a.steps * kStep);
    const bool in_bytes = small == left || small >= kRowsOfSmallPairs;
    rows.pointers = a.pointers + first;
    rows.rows = in_bytes ? small : (left + (left - 1) / at_once) / ((left - 1) / at_once + 1);
    stage.data = static_cast<char*>(out.data) + first * out.stride * bytes_of(out.type);
    if (in_bytes) {
      multiply<typename D::SmallPairs>(rows, weights, begin, end, stage, scratch);
    } else if (rows.rows < kFewRows) {
      multiply<D>(rows, weights, begin, end, stage, scratch);
    } else {
      multiply_words<D>(rows, weights, begin, end, stage, scratch);
    }
  }
}

// Groups whose channels fill vectors. Words of weights are written to memory, those of the even bytes of each
// vector before those of the odd ones; words of values serve all channels of a group where they are made.
template <class D, int kGroup>
void multiply_groups_of_words(const MatrixRows& rows, const MatrixWeights& weights, int64_t begin, int64_t end,
                              const OutputStage& out, void* scratch) {
  constexpr int64_t kVector = D::N * kStep, kTile = D::kMostVectors * D::N;
  int8_t* const words = static_cast<int8_t*>(scratch);
  for_tiles_of_channels<kBlockChannels>(
      weights, begin, end, [&](int64_t channel, int64_t count, const int8_t* data, int64_t width) {
        for (int64_t at = 0; at < rows.segments * rows.steps * width; at += kVector) {
          uint8_t* const even = reinterpret_cast<uint8_t*>(words) + 2 * at;
          D::widen_weights(data + at, even, even + kVector);
        }
        for (int64_t c = 0; c < count; c += kTile) {
          multiply_channels_of_groups<typename D::WithWideWeights, kGroup, 2>(
              rows, words + 2 * c * kStep, width, out, channel + c, smaller(count - c, kTile));
        }
      });
}

template <class D>
void multiply_groups_of_bytes(const MatrixRows& rows, const MatrixWeights& weights, int64_t channels,
                              int64_t begin, int64_t end, const OutputStage& out, void* scratch) {
  const int64_t first = begin * kBlockChannels, last = smaller(end * kBlockChannels, weights.channels);
  if (rows_of_small_pairs<D>(rows, 0, first, last) == rows.rows)
    return multiply_groups<typename D::SmallPairs>(rows, weights, channels, begin, end, out, scratch);
  if constexpr (D::N <= 8) {
    if (channels == 8) return multiply_groups_of_words<D, 8>(rows, weights, begin, end, out, scratch);
  }
  if (channels == 16) return multiply_groups_of_words<D, 16>(rows, weights, begin, end, out, scratch);
  multiply_groups<D>(rows, weights, channels, begin, end, out, scratch);
}

template <class D>
constexpr MatrixKernels matrix_table() {
  return {D::kValueOffset, no_scratch, multiply<D>, multiply_groups<D>};
}

template <class D>
constexpr MatrixKernels widening_matrix_table() {
  return {D::kValueOffset, widened_scratch<D>, multiply_widened<D>, multiply_groups_of_bytes<D>};
}

}  // namespace
}  // namespace fastquant
