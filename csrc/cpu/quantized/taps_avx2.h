// Vectors of 32 bytes of AVX2, for depthwise kernels; with AVX-VNNI where it is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastquant {
namespace {

struct Avx2Taps {
  static constexpr int kLanes = 2;
  static constexpr int kTile = 4;
  static constexpr bool kSigned = false;
  using Bytes = __m256i;
#if defined(__AVXVNNI__)
  static constexpr bool kOneInstruction = true;  // of `dot`
  using Column = __m256i;                        // in each 32 bits, four taps of a channel
#else
  static constexpr bool kOneInstruction = false;
  struct Column {  // taps 0 and 2, and 1 and 3, in each 32 bits: their products are summed without saturation
    __m256i even, odd;
  };
#endif
  using Sums = __m256i;
  using Ints = __m256i;
  using Words = __m256i;
  using Floats = __m256;

  static Bytes set1(uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }
  template <int G>
  static Bytes load(const uint8_t* p, int64_t apart) {
    if constexpr (G == 1) return load_all(p);
    if constexpr (G == 2) return halves(p, p + apart);
  }
  template <int G>
  static Bytes load(const uint8_t* const* p) {
    if constexpr (G == 1) return load_all(p[0]);
    if constexpr (G == 2) return halves(p[0], p[1]);
  }
  template <int G>
  static void store(uint8_t* p, int64_t apart, Bytes x) {
    if constexpr (G == 1) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    if constexpr (G == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + apart), _mm256_extracti128_si256(x, 1));
    }
  }
  static Bytes exclusive_or(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
  static Bytes max(Bytes a, Bytes b) { return _mm256_max_epu8(a, b); }

  static void interleave(const Bytes* row, Column* out) {
    __m256i taps[4];
    interleave_bytes(row, taps);
    for (int j = 0; j < 4; ++j) out[j] = column(taps[j]);
  }
  static void interleave_weights(const Bytes* row, Column* out) {
    __m256i taps[4];
    interleave_bytes(row, taps);
    for (int j = 0; j < 4; ++j) out[j] = weights(taps[j]);
  }

  static Sums zero() { return _mm256_setzero_si256(); }
  static Sums load_sums(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_sums(int32_t* p, Sums x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static Sums negative(Sums x) { return _mm256_sub_epi32(_mm256_setzero_si256(), x); }
#if defined(__AVXVNNI__)
  static Sums dot(Sums sums, Column a, Column b) { return _mm256_dpbusd_avx_epi32(sums, a, b); }
#else
  static Sums dot(Sums sums, const Column& a, const Column& b) {
    return _mm256_add_epi32(_mm256_add_epi32(sums, _mm256_madd_epi16(a.even, b.even)),
                            _mm256_madd_epi16(a.odd, b.odd));
  }
#endif

  static Floats set1_float(float x) { return _mm256_set1_ps(x); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static Floats to_floats(Sums x) { return _mm256_cvtepi32_ps(x); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats add_floats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats min_floats(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Ints round(Floats x) { return _mm256_cvtps_epi32(x); }

  static Words set1_word(int32_t x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static Words words(Ints a, Ints b) { return _mm256_packs_epi32(a, b); }
  static Words add(Words a, Words b) { return _mm256_adds_epi16(a, b); }
  static Bytes bytes(Words a, Words b) { return _mm256_packus_epi16(a, b); }

 private:
  static Bytes load_all(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bytes halves(const uint8_t* a, const uint8_t* b) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    return _mm256_inserti128_si256(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
  }
  static void interleave_bytes(const Bytes* row, __m256i* out) {
    const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm256_unpacklo_epi16(low01, low23);
    out[1] = _mm256_unpackhi_epi16(low01, low23);
    out[2] = _mm256_unpacklo_epi16(high01, high23);
    out[3] = _mm256_unpackhi_epi16(high01, high23);
  }
#if defined(__AVXVNNI__)
  static Column column(__m256i taps) { return taps; }
  static Column weights(__m256i taps) { return taps; }
#else
  static Column column(__m256i taps) {
    return {_mm256_and_si256(taps, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(taps, 8)};
  }
  static Column weights(__m256i taps) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(taps, 8), 8), _mm256_srai_epi16(taps, 8)};
  }
#endif
};

}  // namespace
}  // namespace fastquant
