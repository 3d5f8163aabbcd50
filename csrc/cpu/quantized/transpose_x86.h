// Transposing bytes, for vector types of x86.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastquant {
namespace {

inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store16(uint8_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }

// out[c * t + r] = p[r * s + c], for 16 rows and 16 columns.
inline void transpose16(const uint8_t* p, int64_t s, uint8_t* out, int64_t t) {
  __m128i a[16], b[16];
  for (int k = 0; k < 16; ++k) a[k] = load16(p + k * s);
  // Each round interleaves the vectors k and k + 8. After four, element (r, c) has moved to (c, r).
  for (int round = 0; round < 4; ++round) {
    for (int k = 0; k < 8; ++k) {
      b[2 * k] = _mm_unpacklo_epi8(a[k], a[k + 8]);
      b[2 * k + 1] = _mm_unpackhi_epi8(a[k], a[k + 8]);
    }
    for (int k = 0; k < 16; ++k) a[k] = b[k];
  }
  for (int k = 0; k < 16; ++k) store16(out + k * t, a[k]);
}

// out[3 * c + r] = p[r * s + c], for 3 rows and 16 columns. Byte i of the output is element i / 3 of row i % 3.
inline void interleave3x16(const uint8_t* p, int64_t s, uint8_t* out) {
  const __m128i a = load16(p), b = load16(p + s), c = load16(p + 2 * s);
  const auto put = [&](int k, __m128i of_a, __m128i of_b, __m128i of_c) {
    const __m128i ab = _mm_or_si128(_mm_shuffle_epi8(a, of_a), _mm_shuffle_epi8(b, of_b));
    store16(out + 16 * k, _mm_or_si128(ab, _mm_shuffle_epi8(c, of_c)));
  };
  put(0, _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5),
      _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1),
      _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1));
  put(1, _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1),
      _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10),
      _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1));
  put(2, _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1),
      _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1),
      _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15));
}

}  // namespace
}  // namespace fastquant
