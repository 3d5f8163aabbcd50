// Vectors of 64 bytes of AVX-512 F, BW, DQ and VL, for depthwise kernels; with VNNI where it is compiled for
// it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastquant {
namespace {

struct Avx512Taps {
  static constexpr int kLanes = 4;
  static constexpr int kTile = 7;
  static constexpr bool kSigned = false;
  using Bytes = __m512i;
#if defined(__AVX512VNNI__)
  static constexpr bool kOneInstruction = true;  // of `dot`
  using Column = __m512i;                        // in each 32 bits, four taps of a channel
#else
  static constexpr bool kOneInstruction = false;
  struct Column {  // taps 0 and 2, and 1 and 3, in each 32 bits: their products are summed without saturation
    __m512i even, odd;
  };
#endif
  using Sums = __m512i;
  using Ints = __m512i;
  using Words = __m512i;
  using Floats = __m512;

  static Bytes set1(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
  template <int G>
  static Bytes load(const uint8_t* p, int64_t apart) {
    if constexpr (G == 1) return _mm512_loadu_si512(p);
    if constexpr (G == 2) return halves(p, p + apart);
    if constexpr (G == 4) return quarters(p, p + apart, p + 2 * apart, p + 3 * apart);
  }
  template <int G>
  static Bytes load(const uint8_t* const* p) {
    if constexpr (G == 1) return _mm512_loadu_si512(p[0]);
    if constexpr (G == 2) return halves(p[0], p[1]);
    if constexpr (G == 4) return quarters(p[0], p[1], p[2], p[3]);
  }
  template <int G>
  static void store(uint8_t* p, int64_t apart, Bytes x) {
    if constexpr (G == 1) _mm512_storeu_si512(p, x);
    if constexpr (G == 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + apart), _mm512_extracti64x4_epi64(x, 1));
    }
    if constexpr (G == 4) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(x));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + apart), _mm512_extracti32x4_epi32(x, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * apart), _mm512_extracti32x4_epi32(x, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * apart), _mm512_extracti32x4_epi32(x, 3));
    }
  }
  static Bytes exclusive_or(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
  static Bytes max(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }

  static void interleave(const Bytes* row, Column* out) {
    __m512i taps[4];
    interleave_bytes(row, taps);
    for (int j = 0; j < 4; ++j) out[j] = column(taps[j]);
  }
  static void interleave_weights(const Bytes* row, Column* out) {
    __m512i taps[4];
    interleave_bytes(row, taps);
    for (int j = 0; j < 4; ++j) out[j] = weights(taps[j]);
  }

  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, Sums x) { _mm512_storeu_si512(p, x); }
  static Sums negative(Sums x) { return _mm512_sub_epi32(_mm512_setzero_si512(), x); }
#if defined(__AVX512VNNI__)
  static Sums dot(Sums sums, Column a, Column b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
  }
#else
  static Sums dot(Sums sums, const Column& a, const Column& b) {
    return _mm512_add_epi32(_mm512_add_epi32(sums, _mm512_madd_epi16(a.even, b.even)),
                            _mm512_madd_epi16(a.odd, b.odd));
  }
#endif

  static Floats set1_float(float x) { return _mm512_set1_ps(x); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Floats to_floats(Sums x) { return _mm512_cvtepi32_ps(x); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add_floats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats min_floats(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Ints round(Floats x) { return _mm512_cvtps_epi32(x); }

  static Words set1_word(int32_t x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  static Words words(Ints a, Ints b) { return _mm512_packs_epi32(a, b); }
  static Words add(Words a, Words b) { return _mm512_adds_epi16(a, b); }
  static Bytes bytes(Words a, Words b) { return _mm512_packus_epi16(a, b); }

 private:
  static __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Bytes halves(const uint8_t* a, const uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load32(a)), load32(b), 1);
  }
  static Bytes quarters(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(a)), load16(b), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(c)), load16(d), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static void interleave_bytes(const Bytes* row, __m512i* out) {
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi16(low01, low23);
    out[1] = _mm512_unpackhi_epi16(low01, low23);
    out[2] = _mm512_unpacklo_epi16(high01, high23);
    out[3] = _mm512_unpackhi_epi16(high01, high23);
  }
#if defined(__AVX512VNNI__)
  static Column column(__m512i taps) { return taps; }
  static Column weights(__m512i taps) { return taps; }
#else
  static Column column(__m512i taps) {
    return {_mm512_and_si512(taps, _mm512_set1_epi32(0x00ff00ff)), _mm512_srli_epi16(taps, 8)};
  }
  static Column weights(__m512i taps) {
    return {_mm512_srai_epi16(_mm512_slli_epi16(taps, 8), 8), _mm512_srai_epi16(taps, 8)};
  }
#endif
};

}  // namespace
}  // namespace fastquant
