// Vectors of bytes of AVX2, with the interface of bytes.h.
#pragma once

#include "../vec_avx2.h"
#include "transpose_x86.h"

namespace fastquant {
namespace {

struct Avx2Bytes {
  static constexpr int N = 32;
  static constexpr int kParts = 4, kHalves = 2;
  using Reg = __m256i;
  using Floats = Avx2<float>;
  using Words = __m256i;
  using Ints = __m256i;

  static Reg set1(uint8_t b) { return _mm256_set1_epi8(static_cast<char>(b)); }
  static Reg load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, Reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static Reg load_some(const uint8_t* p, int64_t n) {
    uint8_t whole[N] = {};
    __builtin_memcpy(whole, p, n);
    return load(whole);
  }
  static void store_some(uint8_t* p, Reg x, int64_t n) {
    uint8_t whole[N];
    store(whole, x);
    __builtin_memcpy(p, whole, n);
  }
  static Reg flip(Reg a, Reg b) { return _mm256_xor_si256(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_epu8(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_epu8(a, b); }

  // Both directions as in bytes_avx512.h, except that bytes are unpacked twice: below the upper half of 2^23.
  static __m256 center_of(int zero_point) { return _mm256_set1_ps(0x1p23f + static_cast<float>(zero_point)); }
  static Words words1(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static void widen(Reg x, __m256 center, __m256* y) {
    const __m256i upper = _mm256_set1_epi16(0x4b00);
    Words w[2];
    to_words(x, w);
    for (int k = 0; k < 2; ++k) {
      y[2 * k] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(w[k], upper)), center);
      y[2 * k + 1] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(w[k], upper)), center);
    }
  }
  static Reg narrow(const __m256* y, Words zero_point) {
    // Below -2^31, the conversion gives the least integer, which is right; above 2^31 it would, too.
    const __m256 most = _mm256_set1_ps(0x1p20f);
    __m256 limited[kParts];
    for (int k = 0; k < kParts; ++k) limited[k] = _mm256_min_ps(y[k], most);
    return narrow_few(limited, zero_point);
  }
  static Reg narrow_few(const __m256* y, Words zero_point) {
    __m256i q[kParts];
    for (int k = 0; k < kParts; ++k) q[k] = _mm256_cvtps_epi32(y[k]);
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(q[0], q[1]), zero_point);
    const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(q[2], q[3]), zero_point);
    return _mm256_packus_epi16(low, high);
  }
  static void add_bytes(Reg x, Words* words) {
    Words w[2];
    to_words(x, w);
    words[0] = _mm256_add_epi16(words[0], w[0]);
    words[1] = _mm256_add_epi16(words[1], w[1]);
  }
  static void squares(Reg x, Words* words) {
    to_words(x, words);
    for (int k = 0; k < 2; ++k) words[k] = _mm256_mullo_epi16(words[k], words[k]);
  }
  static void add_words(const Words* words, Ints* ints) {
    const __m256i zero = _mm256_setzero_si256();
    for (int k = 0; k < 2; ++k) {
      ints[2 * k] = _mm256_add_epi32(ints[2 * k], _mm256_unpacklo_epi16(words[k], zero));
      ints[2 * k + 1] = _mm256_add_epi32(ints[2 * k + 1], _mm256_unpackhi_epi16(words[k], zero));
    }
  }
  static __m256 to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Ints ints1(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Words add(Words a, Words b) { return _mm256_add_epi16(a, b); }

  // As in bytes_avx512.h, but the matrix of dwords is one of 2 x 4.
  static void load_centered(const uint8_t* p, Reg f, __m256 center, __m256* y) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    widen(_mm256_permutevar8x32_epi32(flip(load(p), f), order), center, y);
  }
  static Reg narrow_in_order(const __m256* y, Words zero_point) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(narrow(y, zero_point), order);
  }
  static void store_ints(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static constexpr int index_of(int part, int i) { return 16 * (i / 4) + 4 * part + i % 4; }
  static void transpose(const uint8_t* p, int64_t s, uint8_t* out, int64_t t) { transpose16(p, s, out, t); }
  static void interleave3(const uint8_t* p, int64_t s, uint8_t* out) { interleave3x16(p, s, out); }

  static __m256 floats_of_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Every lane gets the same four bytes, and takes its own bits of them.
  static __m256 floats_of_nibbles(const uint8_t* p, int64_t i) {
    int32_t eight;
    __builtin_memcpy(&eight, p + i / 2, sizeof eight);
    const __m256i own =
        _mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(own, _mm256_set1_epi32(15)));
  }

  // Each of 16 rows of the table is looked up by the lower half of x; then the bits of its upper half choose
  // among them, two rows at a time.
  static constexpr bool kLooksUpFast = false;
  struct Table {
    explicit Table(const uint8_t* entries) {
      for (int k = 0; k < 16; ++k) rows[k] = _mm256_broadcastsi128_si256(load16(entries + 16 * k));
    }
    __m256i rows[16];
  };
  static Reg look_up(const Table& table, Reg x) {
    const __m256i lower = _mm256_and_si256(x, _mm256_set1_epi8(15));
    __m256i found[16];
    for (int k = 0; k < 16; ++k) found[k] = _mm256_shuffle_epi8(table.rows[k], lower);
    // Blending looks at the highest bit of each byte.
    const __m256i bits[] = {_mm256_slli_epi16(x, 3), _mm256_slli_epi16(x, 2), _mm256_slli_epi16(x, 1), x};
    for (int round = 0, count = 8; round < 4; ++round, count /= 2) {
      for (int k = 0; k < count; ++k)
        found[k] = _mm256_blendv_epi8(found[2 * k], found[2 * k + 1], bits[round]);
    }
    return found[0];
  }

 private:
  static void to_words(Reg x, Words* w) {
    const __m256i zero = _mm256_setzero_si256();
    w[0] = _mm256_unpacklo_epi8(x, zero);
    w[1] = _mm256_unpackhi_epi8(x, zero);
  }
};

}  // namespace
}  // namespace fastquant
