// The kernels of tile_kernels.h for AMX: a block is a tile register.
//
// Included headers aside, nothing here may be inline and have external linkage: see kernels-inl.h.
#include "quantized/tiles_amx.h"
#include "tile_kernels.h"
#include "vec_avx512.h"

namespace fastquant {
namespace {

using V = Avx512<float>;
static_assert(kTileSide == kTileRows && kTileDepth * 2 == kTileRowBytes && V::N == kTileSide);

constexpr int64_t kBlock = kTileSide * kTileDepth;  // elements of a tile of bf16

// Registers: sums of the first and second block of rows, rows, columns.
constexpr int kRows = 4, kColumns = 6;

void configure_whole_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kTileRows, kTileRowBytes);
  configure_tiles(shapes);
}

__mmask32 first_of_32(int64_t n) { return n >= 32 ? ~uint32_t{0} : (uint32_t{1} << n) - 1; }
__mmask16 first_of_16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (uint32_t{1} << n) - 1); }

template <int kBlocks>
void product_of_blocks(const TileProduct& p) {
  constexpr int64_t kWide = 2 * kTileSide;
  const int64_t x_stride = p.pair_stride * 4, y_stride = p.y_stride * 4;
  const int64_t outer_stride = p.inner_blocks * p.taps * kBlock;
  for (int64_t at = 0; at < p.positions; at += kWide) {
    unrolled<2 * kBlocks>([&](auto i) FASTQUANT_INLINE_LAMBDA { zero_tile<i>(); });
    const BFloat16* weight = p.weight;
    const uint32_t* x = p.x + at;
    for (int64_t block = 0; block < p.inner_blocks; ++block, x += kTileSide * p.pair_stride) {
      for (int64_t tap = 0; tap < p.taps; ++tap, weight += kBlock) {
        const uint32_t* const from = x + p.offsets[tap];
        unrolled<2>([&](auto c)
                        FASTQUANT_INLINE_LAMBDA { load_tile<kColumns + c>(from + c * kTileSide, x_stride); });
        unrolled<kBlocks>([&](auto r) FASTQUANT_INLINE_LAMBDA {
          load_tile<kRows + r>(weight + r * outer_stride, kTileRowBytes);
          unrolled<2>([&](auto c)
                          FASTQUANT_INLINE_LAMBDA { add_bf16_products<2 * r + c, kRows + r, kColumns + c>(); });
        });
      }
    }
    unrolled<kBlocks>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      unrolled<2>([&](auto c) FASTQUANT_INLINE_LAMBDA {
        store_tile<2 * r + c>(p.y + r * kTileSide * p.y_stride + at + c * kTileSide, y_stride);
      });
    });
  }
}

void product(const TileProduct& p, int64_t outer_blocks) {
  configure_whole_tiles();
  (outer_blocks == 1 ? product_of_blocks<1> : product_of_blocks<2>)(p);
  release_tiles();
}

void sums(const TileSums& s) {
  constexpr int64_t kWide = 2 * kTileSide, kLongest = 16 * kTileDepth;  // in the first cache
  const int64_t x_stride = s.x_stride * 4, grad_stride = s.grad_stride * 2;
  alignas(64) float part[kWide * kWide];
  configure_whole_tiles();
  for (int64_t first = 0; first < s.positions; first += kLongest) {
    const int64_t end = first + kLongest < s.positions ? first + kLongest : s.positions;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      unrolled<4>([&](auto i) FASTQUANT_INLINE_LAMBDA { zero_tile<i>(); });
      for (int64_t at = first; at < end; at += kTileDepth) {
        const uint32_t* const x = s.x + at / 2 * s.x_stride;
        const BFloat16* const grad = s.grad + at - s.offsets[tap];
        unrolled<2>([&](auto c)
                        FASTQUANT_INLINE_LAMBDA { load_tile<kColumns + c>(x + c * kTileSide, x_stride); });
        unrolled<2>([&](auto r) FASTQUANT_INLINE_LAMBDA {
          load_tile<kRows + r>(grad + r * kTileSide * s.grad_stride, grad_stride);
          unrolled<2>([&](auto c)
                          FASTQUANT_INLINE_LAMBDA { add_bf16_products<2 * r + c, kRows + r, kColumns + c>(); });
        });
      }
      unrolled<2>([&](auto r) FASTQUANT_INLINE_LAMBDA {
        unrolled<2>([&](auto c) FASTQUANT_INLINE_LAMBDA {
          store_tile<2 * r + c>(part + r * kTileSide * kWide + c * kTileSide, kWide * 4);
        });
      });
      // Sums of a bounded number of products, so that those of large batches are as precise.
      float* const total = s.sums + tap * kWide * kWide;
      for (int64_t i = 0; i < kWide * kWide; i += V::N) {
        V::store(total + i, V::add(V::load(total + i), V::load(part + i)));
      }
    }
  }
  release_tiles();
}

__m256i load_first(const BFloat16* x, __mmask16 these) { return _mm256_maskz_loadu_epi16(these, x); }

void pair_rows(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t lines, int64_t width, uint32_t* y,
               int64_t y_stride, int64_t line_stride) {
  for (int64_t r = 0; r < rows; r += 2, y += y_stride) {
    const BFloat16 *low = x + r * x_stride, *high = low + x_stride;
    const bool has_high = r + 1 < rows;
    for (int64_t line = 0; line < lines; ++line, low += width, high += width) {
      uint32_t* const to = y + line * line_stride;
      for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 these = first_of_16(width - i), those = has_high ? these : __mmask16{0};
        const __m512i of_low = _mm512_cvtepu16_epi32(load_first(low + i, these));
        const __m512i of_high = _mm512_cvtepu16_epi32(load_first(high + i, those));
        _mm512_mask_storeu_epi32(to + i, these, _mm512_or_si512(of_low, _mm512_slli_epi32(of_high, 16)));
      }
    }
  }
}

void place_rows(const BFloat16* x, int64_t x_stride, int64_t rows, int64_t lines, int64_t width, BFloat16* y,
                int64_t y_stride, int64_t line_stride) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t i = 0; i < width; i += 32) {
        const __mmask32 these = first_of_32(width - i);
        _mm512_mask_storeu_epi16(y + line * line_stride + i, these,
                                 _mm512_maskz_loadu_epi16(these, x + line * width + i));
      }
    }
  }
}

void transpose16(const uint32_t* x, int64_t x_stride, uint32_t* y, int64_t y_stride) {
  __m512i a[16], b[16];
  unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { a[i] = _mm512_loadu_si512(x + i * x_stride); });
  // Each round interleaves the vectors k and k + 8. After four, element (r, c) has moved to (c, r).
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  unrolled<4>([&](auto) FASTQUANT_INLINE_LAMBDA {
    unrolled<8>([&](auto k) FASTQUANT_INLINE_LAMBDA {
      b[2 * k] = _mm512_permutex2var_epi32(a[k], first, a[k + 8]);
      b[2 * k + 1] = _mm512_permutex2var_epi32(a[k], second, a[k + 8]);
    });
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { a[i] = b[i]; });
  });
  unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { _mm512_storeu_si512(y + i * y_stride, a[i]); });
}

void transpose(const uint32_t* x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t* y,
               int64_t y_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      transpose16(x + r * x_stride + c, x_stride, y + c * y_stride + r, y_stride);
    }
  }
}

__mmask16 not_finite(__m512 x) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  return _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(x), exponent), exponent);
}

bool narrow(const float* x, int64_t line_stride, int64_t lines, int64_t width, float bias, BFloat16* y) {
  const __m512 added = _mm512_set1_ps(bias);
  __mmask16 infinite = 0;
  for (int64_t line = 0; line < lines; ++line, x += line_stride, y += width) {
    int64_t i = 0;
    for (; i + V::N <= width; i += V::N) {
      const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(x + i), added);
      infinite |= not_finite(sum);
      V::store(y + i, sum);
    }
    if (i == width) continue;
    const __mmask16 these = first_of_16(width - i);
    const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(these, x + i), added);
    infinite |= static_cast<__mmask16>(not_finite(sum) & these);
    alignas(32) BFloat16 last[V::N];
    V::store(last, sum);
    _mm256_mask_storeu_epi16(y + i, these, _mm256_load_si256(reinterpret_cast<const __m256i*>(last)));
  }
  return infinite == 0;
}

// Two blocks of sums in bf16.
__m512i narrowed(const float* sums, __mmask16* infinite) {
  alignas(64) BFloat16 both[2 * V::N];
  unrolled<2>([&](auto i) FASTQUANT_INLINE_LAMBDA {
    const __m512 sum = _mm512_loadu_ps(sums + i * V::N);
    *infinite |= not_finite(sum);
    V::store(both + i * V::N, sum);
  });
  return _mm512_load_si512(both);
}

bool interleave(const float* sums, int64_t sums_stride, int64_t taps, int64_t channels, BFloat16* y) {
  __mmask16 infinite = 0;
  if (taps == 1) {
    _mm512_mask_storeu_epi16(y, first_of_32(channels), narrowed(sums, &infinite));
    return infinite == 0;
  }
  constexpr int kTaps = 9, kEach = 32;
  __m512i of_tap[kTaps];
  unrolled<kTaps>([&](auto t)
                      FASTQUANT_INLINE_LAMBDA { of_tap[t] = narrowed(sums + t * sums_stride, &infinite); });
  // Element j of vector k is of channel (kEach k + j) / 9 and of tap (kEach k + j) % 9.
  unrolled<kTaps>([&](auto k) FASTQUANT_INLINE_LAMBDA {
    alignas(64) uint16_t channel[kEach];
    for (int j = 0; j < kEach; ++j) channel[j] = static_cast<uint16_t>((kEach * k + j) / kTaps);
    const __m512i index = _mm512_load_si512(channel);
    __m512i all = _mm512_setzero_si512();
    unrolled<kTaps>([&](auto t) FASTQUANT_INLINE_LAMBDA {
      // Every ninth element.
      constexpr int kFirst = (t + kTaps * kEach - kEach * k) % kTaps;
      constexpr uint32_t kThese = uint32_t{0x08040201} << kFirst;
      all = _mm512_mask_permutexvar_epi16(all, kThese, index, of_tap[t]);
    });
    const int64_t left = channels * kTaps - kEach * k;
    if (left > 0) _mm512_mask_storeu_epi16(y + kEach * k, first_of_32(left), all);
  });
  return infinite == 0;
}

}  // namespace

extern const TileKernels kTileKernelsAmx = {product,   sums,   pair_rows, place_rows,
                                            transpose, narrow, interleave};

}  // namespace fastquant
