// Vectors of bytes of AVX-512 F, BW, DQ and VL, with the interface of bytes.h.
#pragma once

#include "../vec_avx512.h"
#include "transpose_x86.h"

namespace fastquant {
namespace {

struct Avx512Bytes {
  static constexpr int N = 64;
  static constexpr int kParts = 4, kHalves = 2;
  using Reg = __m512i;
  using Floats = Avx512<float>;
  using Words = __m512i;
  using Ints = __m512i;

  static Reg set1(uint8_t b) { return _mm512_set1_epi8(static_cast<char>(b)); }
  static Reg load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, Reg x) { _mm512_storeu_si512(p, x); }
  static Reg load_some(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8(first(n), p); }
  static void store_some(uint8_t* p, Reg x, int64_t n) { _mm512_mask_storeu_epi8(p, first(n), x); }
  static Reg flip(Reg a, Reg b) { return _mm512_xor_si512(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epu8(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_epu8(a, b); }

  // A byte becomes the fp32 number 2^23 + x by replacing the lowest byte of 2^23. Part k has bytes 4k to 4k + 3
  // of each lane of 128 bits, and the packing of narrow() is the exact reverse.
  static __m512 center_of(int zero_point) { return _mm512_set1_ps(0x1p23f + static_cast<float>(zero_point)); }
  static Words words1(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  static void widen(Reg x, __m512 center, __m512* y) {
    constexpr __mmask64 kLowest = 0x1111111111111111u;
    const __m512i upper = _mm512_set1_epi32(0x4b000000);
    for (int k = 0; k < kParts; ++k) {
      const __m512i from = _mm512_broadcast_i32x4(_mm_set_epi32(4 * k + 3, 4 * k + 2, 4 * k + 1, 4 * k));
      y[k] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_mask_shuffle_epi8(upper, kLowest, x, from)), center);
    }
  }
  static Reg narrow(const __m512* y, Words zero_point) {
    // Below -2^31, the conversion gives the least integer, which is right; above 2^31 it would, too.
    const __m512 most = _mm512_set1_ps(0x1p20f);
    __m512 limited[kParts];
    for (int k = 0; k < kParts; ++k) limited[k] = _mm512_min_ps(y[k], most);
    return narrow_few(limited, zero_point);
  }
  static Reg narrow_few(const __m512* y, Words zero_point) {
    __m512i q[kParts];
    for (int k = 0; k < kParts; ++k) q[k] = _mm512_cvtps_epi32(y[k]);
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero_point);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero_point);
    return _mm512_packus_epi16(low, high);
  }
  static void add_bytes(Reg x, Words* words) {
    Words w[2];
    to_words(x, w);
    words[0] = _mm512_add_epi16(words[0], w[0]);
    words[1] = _mm512_add_epi16(words[1], w[1]);
  }
  static void squares(Reg x, Words* words) {
    to_words(x, words);
    for (int k = 0; k < 2; ++k) words[k] = _mm512_mullo_epi16(words[k], words[k]);
  }
  static void add_words(const Words* words, Ints* ints) {
    const __m512i zero = _mm512_setzero_si512();
    for (int k = 0; k < 2; ++k) {
      ints[2 * k] = _mm512_add_epi32(ints[2 * k], _mm512_unpacklo_epi16(words[k], zero));
      ints[2 * k + 1] = _mm512_add_epi32(ints[2 * k + 1], _mm512_unpackhi_epi16(words[k], zero));
    }
  }
  static __m512 to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Ints ints1(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Words add(Words a, Words b) { return _mm512_add_epi16(a, b); }

  // The order that widen() and narrow() give elements is that of memory with each group of 16 dwords transposed
  // as a matrix of 4 x 4.
  static void load_centered(const uint8_t* p, Reg f, __m512 center, __m512* y) {
    widen(transposed(flip(load(p), f)), center, y);
  }
  static Reg narrow_in_order(const __m512* y, Words zero_point) { return transposed(narrow(y, zero_point)); }
  static void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
  static constexpr int index_of(int part, int i) { return 16 * (i / 4) + 4 * part + i % 4; }
  static void transpose(const uint8_t* p, int64_t s, uint8_t* out, int64_t t) { transpose16(p, s, out, t); }
  static void interleave3(const uint8_t* p, int64_t s, uint8_t* out) { interleave3x16(p, s, out); }

  static __m512 floats_of_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Every lane gets four of the eight bytes, and takes its own bits of them.
  static __m512 floats_of_nibbles(const uint8_t* p, int64_t i) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i / 2));
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i own =
        _mm512_srlv_epi32(_mm512_permutexvar_epi32(halves, _mm512_castsi128_si512(eight)), shifts);
    return _mm512_cvtepi32_ps(_mm512_and_si512(own, _mm512_set1_epi32(15)));
  }

  // Without AVX512_VBMI (bytes_avx512_vbmi.h), only words can be looked up in two registers: the word that
  // holds entry x is at x / 2, and the lowest bit of x says which half of it is wanted.
  static constexpr bool kLooksUpFast = true;
  struct Table {
    explicit Table(const uint8_t* entries) {
      for (int k = 0; k < 4; ++k) rows[k] = _mm512_loadu_si512(entries + 64 * k);
    }
    __m512i rows[4];
  };
  static Reg look_up(const Table& table, Reg x) {
    const __m512i even = entries(table, _mm512_and_si512(x, _mm512_set1_epi16(0xff)));
    const __m512i odd = entries(table, _mm512_srli_epi16(x, 8));
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaau, even, _mm512_slli_epi16(odd, 8));
  }

 private:
  static Reg transposed(Reg x) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, x);
  }
  static __mmask64 first(int64_t n) { return (__mmask64{1} << n) - 1; }
  static void to_words(Reg x, Words* w) {
    const __m512i zero = _mm512_setzero_si512();
    w[0] = _mm512_unpacklo_epi8(x, zero);
    w[1] = _mm512_unpackhi_epi8(x, zero);
  }
  // table[x] in the lower byte of each word, for x of 0 to 255.
  static __m512i entries(const Table& table, __m512i x) {
    const __m512i at = _mm512_srli_epi16(x, 1);
    const __m512i low = _mm512_permutex2var_epi16(table.rows[0], at, table.rows[1]);
    const __m512i high = _mm512_permutex2var_epi16(table.rows[2], at, table.rows[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x80));
    const __m512i word = _mm512_mask_blend_epi16(upper, low, high);
    const __m512i shift = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(1)), 3);
    return _mm512_srlv_epi16(word, shift);
  }
};

}  // namespace
}  // namespace fastquant
