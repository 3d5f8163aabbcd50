// Pointwise convolutions (../pointwise.h): products of a matrix of weights and the matrix [channels, positions]
// of each image, and sums of products over positions.
//
// Tiles of sums stay in registers while the factors stream by. A sum is one chain of fused multiplications and
// additions, or one for each of kPositionUnit remainders, whose order does not depend on tiles. So results have
// the same bits on every instruction set.
#pragma once

#include "../kernels.h"
#include "../quantized/kernels/unrolled-inl.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// The sizes of the largest tiles whose sums stay in registers. AVX2 has 16 registers, AVX-512 and NEON have 32.
template <class V>
struct PointwiseTiles {
  static constexpr int kVectors = kPositionUnit / V::N;  // that make a unit
  // Of a product.
  static constexpr int kUnits = V::N == kPositionUnit ? 2 : 1;
  static constexpr int kRows = V::N == kPositionUnit ? 12 : V::N == 1 ? 1 : 6;
  // Of sums over positions: pairs of rows.
  static constexpr int kDotRows = V::N == kPositionUnit ? 4 : V::N == 1 ? 1 : 2;
  static constexpr int kDotColumns = V::N == kPositionUnit ? 4 : V::N == 1 ? 1 : 3;
};

// ---------------------------------------------------------------------------- products

// The weights of a tile's rows for one input after the other. One of the two strides is 1; to know which lets a
// few registers address all rows.
template <bool kOuterIsUnit, int kRows>
struct TileWeights {
  static constexpr int kTogether = 3, kBases = kOuterIsUnit ? 1 : (kRows + kTogether - 1) / kTogether;

  template <class S>
  FASTQUANT_INLINE TileWeights(const PointwiseProduct<S>& p, int64_t row)
      : row_stride(p.weight_outer_stride), step(kOuterIsUnit ? p.weight_inner_stride : 1) {
    const float* const first = p.weight + row * row_stride;
    for (int i = 0; i < kBases; ++i) base[i] = first + i * kTogether * row_stride;
  }

  FASTQUANT_INLINE float operator()(int r) const {
    return kOuterIsUnit ? base[0][r] : base[r / kTogether][r % kTogether * row_stride];
  }

  FASTQUANT_INLINE void next() {
    unrolled<kBases>([&](auto i) FASTQUANT_INLINE_LAMBDA { base[i] += step; });
  }

  int64_t row_stride, step;
  const float* base[kBases];
};

// The rows [row, row + kRows) of kUnits units. Channels of x and y are so many elements apart.
template <class V, int kRows, int kUnits, bool kOuterIsUnit, class S>
void pointwise_tile(const PointwiseProduct<S>& p, int64_t row, const S* const* x, int64_t x_stride, S* const* y,
                    int64_t y_stride) {
  constexpr int kPerUnit = PointwiseTiles<V>::kVectors, kVectors = kUnits * kPerUnit;
  // A tile of few inputs takes less time than memory does, so more than the next tile is fetched.
  constexpr int64_t kFetchedAhead = 2 * kUnits * kPositionUnit;
  typename V::Reg sums[kRows * kVectors];
  unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    const auto start = V::set1(p.bias == nullptr ? 0.0f : p.bias[row + r]);
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA { sums[r * kVectors + v] = start; });
  });
  const S* from[kUnits];
  unrolled<kUnits>([&](auto u) FASTQUANT_INLINE_LAMBDA { from[u] = x[u]; });
  TileWeights<kOuterIsUnit, kRows> weights(p, row);
  for (int64_t k = 0; k < p.inner; ++k) {
    typename V::Reg values[kVectors];
    unrolled<kVectors>(
        [&](auto v) FASTQUANT_INLINE_LAMBDA { values[v] = V::load(from[v / kPerUnit] + v % kPerUnit * V::N); });
    unrolled<kUnits>([&](auto u) FASTQUANT_INLINE_LAMBDA {
      __builtin_prefetch(from[u] + kFetchedAhead);
      from[u] += x_stride;
    });
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      const auto w = V::set1(weights(r));
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        auto& sum = sums[r * kVectors + v];
        sum = V::madd(w, values[v], sum);
      });
    });
    weights.next();
  }
  unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      S* const to = y[v / kPerUnit] + r * y_stride + v % kPerUnit * V::N;
      const auto sum = sums[r * kVectors + v];
      V::store(to, p.adds ? V::add(V::load(to), sum) : sum);
    });
  });
}

// Images of [channels, positions], one after the other.
template <class T>
struct ImagesAt {
  T* data;
  int64_t images, channels, positions;
};

// Calls f(the position in memory, how many positions, where they are in a unit) for the parts of a channel that
// are in a unit that images share. Returns how many positions of the unit are used.
template <class T, class F>
int64_t for_shared(const ImagesAt<T>& x, const PositionUnits& units, int64_t unit, int64_t channel,
                   const F& f) {
  const int64_t first = (unit - units.in_images) * units.images_of_shared;
  const int64_t count = smaller(units.images_of_shared, x.images - first);
  T* part = x.data + (first * x.channels + channel) * x.positions + units.in_image * kPositionUnit;
  for (int64_t i = 0; i < count; ++i, part += x.channels * x.positions) f(part, i * units.left);
  return count * units.left;
}

// Copies channels of a unit that images share to packed, [count, kPositionUnit].
template <class T, class S>
void pack_shared(const ImagesAt<T>& x, const PositionUnits& units, int64_t unit, int64_t channel, int64_t count,
                 S* packed) {
  for (int64_t c = 0; c < count; ++c, packed += kPositionUnit) {
    const int64_t used = for_shared(x, units, unit, channel + c, [&](const S* part, int64_t at) {
      for (int64_t j = 0; j < units.left; ++j) packed[at + j] = part[j];
    });
    for (int64_t i = used; i < kPositionUnit; ++i) packed[i] = S{};
  }
}

// The inverse.
template <class S>
void unpack_shared(const ImagesAt<S>& y, const PositionUnits& units, int64_t unit, int64_t channel,
                   int64_t count, const S* packed) {
  for (int64_t c = 0; c < count; ++c, packed += kPositionUnit) {
    for_shared(y, units, unit, channel + c, [&](S* part, int64_t at) {
      for (int64_t j = 0; j < units.left; ++j) part[j] = packed[at + j];
    });
  }
}

// The rows [row, row + kRows) of the units [begin, end). Inputs of units that images share are in `shared`.
template <class V, int kRows, bool kOuterIsUnit, class S>
void pointwise_units(const PointwiseProduct<S>& p, int64_t row, int64_t begin, int64_t end, const S* shared) {
  constexpr int kUnits = PointwiseTiles<V>::kUnits;
  const int64_t whole_end = smaller(end, p.units.in_images);
  int64_t unit = begin;
  if (unit < whole_end) {
    int64_t image = begin / p.units.in_image, at = begin % p.units.in_image;
    const S* x[kUnits];
    S* y[kUnits];
    const auto next = [&](int u) FASTQUANT_INLINE_LAMBDA {
      x[u] = p.x + image * p.inner * p.positions + at * kPositionUnit;
      y[u] = p.y + (image * p.outer + row) * p.positions + at * kPositionUnit;
      if (++at == p.units.in_image) at = 0, ++image;
    };
    for (; unit + kUnits <= whole_end; unit += kUnits) {
      for (int u = 0; u < kUnits; ++u) next(u);
      pointwise_tile<V, kRows, kUnits, kOuterIsUnit>(p, row, x, p.positions, y, p.positions);
    }
    for (; unit < whole_end; ++unit) {
      next(0);
      pointwise_tile<V, kRows, 1, kOuterIsUnit>(p, row, x, p.positions, y, p.positions);
    }
  }
  const ImagesAt<S> y = {p.y, p.images, p.outer, p.positions};
  for (; unit < end; ++unit, shared += p.inner * kPositionUnit) {
    S packed[kRows * kPositionUnit];
    if (p.adds) pack_shared(y, p.units, unit, row, kRows, packed);
    S* const to = packed;
    pointwise_tile<V, kRows, 1, kOuterIsUnit>(p, row, &shared, kPositionUnit, &to, kPositionUnit);
    unpack_shared(y, p.units, unit, row, kRows, packed);
  }
}

template <class V, int kRows = PointwiseTiles<V>::kRows, class S>
void pointwise_rows(int64_t rows, const PointwiseProduct<S>& p, int64_t row, int64_t begin, int64_t end,
                    const S* shared) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return pointwise_rows<V, kRows - 1>(rows, p, row, begin, end, shared);
  }
  if (p.weight_outer_stride == 1) {
    pointwise_units<V, kRows, true>(p, row, begin, end, shared);
  } else {
    pointwise_units<V, kRows, false>(p, row, begin, end, shared);
  }
}

template <class V, class S>
void pointwise_product(const PointwiseProduct<S>& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                       S* scratch) {
  constexpr int64_t kMost = PointwiseTiles<V>::kRows;
  const ImagesAt<const S> x = {p.x, p.images, p.inner, p.positions};
  for (int64_t stop; begin < end; begin = stop) {
    stop = smaller(begin + p.units_at_once, end);
    const int64_t first_shared = begin < p.units.in_images ? p.units.in_images : begin;
    for (int64_t u = first_shared; u < stop; ++u) {
      pack_shared(x, p.units, u, 0, p.inner, scratch + (u - first_shared) * p.inner * kPositionUnit);
    }
    // Tiles of nearly the same height.
    int64_t row = first;
    for (int64_t tiles = (last - first + kMost - 1) / kMost; tiles > 0; --tiles) {
      const int64_t rows = (last - row) / tiles;
      pointwise_rows<V>(rows, p, row, begin, stop, scratch);
      row += rows;
    }
  }
}

// ------------------------------------------------------------------ sums over positions

// Pairs of kRows rows of a and kColumns rows of b. sums[r, c] begins r * sums_stride + c * kPositionUnit
// elements after `sums`.
template <class V, int kRows, int kColumns, class S>
void dot_tile(const S* a, const S* b, int64_t stride, int64_t columns, float* sums, int64_t sums_stride) {
  constexpr int kVectors = PointwiseTiles<V>::kVectors, kSums = kRows * kColumns * kVectors;
  typename V::Reg totals[kSums];
  const auto place = [&](auto i) FASTQUANT_INLINE_LAMBDA {
    constexpr int pair = i / kVectors, vector = i % kVectors;
    return sums + pair / kColumns * sums_stride + pair % kColumns * kPositionUnit + vector * V::N;
  };
  unrolled<kSums>([&](auto i) FASTQUANT_INLINE_LAMBDA { totals[i] = V::load(place(i)); });
  for (int64_t j = 0; j < columns; j += kPositionUnit) {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      typename V::Reg values[kColumns];
      unrolled<kColumns>([&](auto c)
                             FASTQUANT_INLINE_LAMBDA { values[c] = V::load(b + c * stride + j + v * V::N); });
      unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
        const auto value = V::load(a + r * stride + j + v * V::N);
        unrolled<kColumns>([&](auto c) FASTQUANT_INLINE_LAMBDA {
          auto& total = totals[(r * kColumns + c) * kVectors + v];
          total = V::madd(value, values[c], total);
        });
      });
    });
  }
  unrolled<kSums>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(place(i), totals[i]); });
}

// The tile of at most kRows of the `a_rows` rows and kColumns of the `b_rows` rows that are left.
template <class V, int kRows, int kColumns, class S>
void dot_tile_of(int64_t a_rows, int64_t b_rows, const S* a, const S* b, int64_t stride, int64_t columns,
                 float* sums, int64_t sums_stride) {
  if constexpr (kRows > 1) {
    if (a_rows < kRows) {
      return dot_tile_of<V, kRows - 1, kColumns>(a_rows, b_rows, a, b, stride, columns, sums, sums_stride);
    }
  }
  if constexpr (kColumns > 1) {
    if (b_rows < kColumns) {
      return dot_tile_of<V, kRows, kColumns - 1>(a_rows, b_rows, a, b, stride, columns, sums, sums_stride);
    }
  }
  dot_tile<V, kRows, kColumns>(a, b, stride, columns, sums, sums_stride);
}

template <class V, class S>
void pointwise_dots(const S* a, int64_t a_rows, const S* b, int64_t b_rows, int64_t stride, int64_t columns,
                    float* sums) {
  constexpr int kRows = PointwiseTiles<V>::kDotRows, kColumns = PointwiseTiles<V>::kDotColumns;
  constexpr int64_t kCached = int64_t{64} << 10;  // elements, in the second cache
  const int64_t units = kCached / (a_rows + b_rows) / kPositionUnit,
                at_once = (units < 1 ? 1 : units) * kPositionUnit;
  for (int64_t j = 0; j < columns; j += at_once) {
    const int64_t count = smaller(at_once, columns - j);
    for (int64_t c = 0; c < b_rows; c += kColumns) {
      for (int64_t r = 0; r < a_rows; r += kRows) {
        dot_tile_of<V, kRows, kColumns>(a_rows - r, b_rows - c, a + r * stride + j, b + c * stride + j, stride,
                                        count, sums + (r * b_rows + c) * kPositionUnit, b_rows * kPositionUnit);
      }
    }
  }
}

inline void sum_units(const float* sums, int64_t count, float* totals) {
  static_assert(kPositionUnit == 16);
  for (int64_t i = 0; i < count; ++i, sums += kPositionUnit) {
    float t[8];
    for (int k = 0; k < 8; ++k) t[k] = sums[k] + sums[k + 8];
    for (int k = 0; k < 4; ++k) t[k] += t[k + 4];
    totals[i] = (t[0] + t[2]) + (t[1] + t[3]);
  }
}

template <class S>
void transpose(const S* x, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int64_t height = smaller(kBlock, rows - r);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < height; ++i) y[c * y_stride + r + i] = to_compute(x[(r + i) * columns + c]);
    }
  }
}

template <class S>
void widen(const S* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_compute(x[i]);
}

template <class V, class S>
constexpr PointwiseKernels<S> pointwise_kernels() {
  return {pointwise_product<V, S>, pointwise_dots<V, S>, transpose<S>, widen<S>};
}

}  // namespace
}  // namespace fastquant
