// Products and sums in AVX-512, with and without VNNI: the interface of kernels/matrix-inl.h and
// kernels/output-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastquant {
namespace {

// Shuffles that spread 16 bytes of each 128 bits over the channels of groups: the four values of groups of 4
// channels; the first four, and the second, of groups of 8.
constexpr uint32_t kFour0 = 0x03020100, kFour1 = 0x07060504, kFour2 = 0x0b0a0908, kFour3 = 0x0f0e0d0c;
alignas(64) constexpr uint32_t kFoursOfGroups[3][16] = {
    {kFour0, kFour0, kFour0, kFour0, kFour1, kFour1, kFour1, kFour1, kFour2, kFour2, kFour2, kFour2, kFour3,
     kFour3, kFour3, kFour3},
    {kFour0, kFour0, kFour0, kFour0, kFour0, kFour0, kFour0, kFour0, kFour2, kFour2, kFour2, kFour2, kFour2,
     kFour2, kFour2, kFour2},
    {kFour1, kFour1, kFour1, kFour1, kFour1, kFour1, kFour1, kFour1, kFour3, kFour3, kFour3, kFour3, kFour3,
     kFour3, kFour3, kFour3}};

struct Avx512Lanes {
  static constexpr int N = 16;
  using Ints = __m512i;
  using Floats = __m512;

  static Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
  static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static Ints set1(int32_t x) { return _mm512_set1_epi32(x); }
  static Floats set1(float x) { return _mm512_set1_ps(x); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

  struct Limits {
    __m512i zero_point, low, flip;
  };
  static Limits limits(int32_t zero_point, uint8_t low, uint8_t flip) {
    return {_mm512_set1_epi16(static_cast<int16_t>(zero_point)), _mm512_set1_epi8(static_cast<char>(low)),
            _mm512_set1_epi8(static_cast<char>(flip))};
  }
  template <int kVectors>
  static void store_bytes(uint8_t* p, const Ints (&x)[kVectors], const Limits& limits, int64_t count) {
    const Ints& last = x[kVectors - 1];
    const __m512i low = words(x[0], kVectors > 1 ? x[1] : last, limits);
    const __m512i high = kVectors > 2 ? words(x[kVectors > 2 ? 2 : 0], last, limits) : low;
    // Each group of 16 bytes has four of every vector.
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
    const __m512i y = _mm512_xor_si512(_mm512_max_epu8(bytes, limits.low), limits.flip);
    if (count < N * kVectors) {
      _mm512_mask_storeu_epi8(p, (uint64_t{1} << count) - 1, y);
    } else if constexpr (kVectors == 4) {
      _mm512_storeu_si512(p, y);
    } else if constexpr (kVectors == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(y));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(y));
      if constexpr (kVectors == 3) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32), _mm512_extracti32x4_epi32(y, 2));
      }
    }
  }

  static void store_bfloat16(uint16_t* p, Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  static constexpr int64_t kValueOffset = 0;
  static __m512i four(const void* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static constexpr int kMostSpread = 8;
  template <int C>
  static __m512i fours_of_groups(const uint8_t* p, int64_t k) {
    if constexpr (C == 16) {  // by loads and shuffles in turns, which other parts of the processor do
      if (k % 2 == 0) return four(p + 4 * k);
      const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return k == 1 ? _mm512_shuffle_epi32(all, _MM_PERM_BBBB) : _mm512_shuffle_epi32(all, _MM_PERM_DDDD);
    }
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_shuffle_epi8(bytes, _mm512_load_si512(kFoursOfGroups[C / 4 - 1 + k]));
  }

  static constexpr int kMostVectors = 4;
  static constexpr int kSums = 16;

 private:
  static __m512i words(Ints a, Ints b, const Limits& limits) {
    return _mm512_adds_epi16(_mm512_packs_epi32(a, b), limits.zero_point);
  }
};

// Values and weights that take one register each.
struct Avx512Singles : Avx512Lanes {
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 4   ? 6
                                   : kVectors == 3 ? 8
                                   : kVectors == 2 ? 12
                                                   : 16;
  using Values = __m512i;
  using Weights = __m512i;
  static Values values(const uint8_t* p) { return four(p); }
  template <int C>
  static Values group_values(const uint8_t* p, int64_t k) {
    return fours_of_groups<C>(p, k);
  }
  static Weights weights(const int8_t* p) { return _mm512_loadu_si512(p); }
};

// Bytes as words, of which two are multiplied and added at once: the first and third of four, the second and
// fourth.
struct Avx512Dot : Avx512Lanes {
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 4 ? 5 : 8;
  struct Values {
    __m512i even, odd;
  };
  using Weights = Values;
  static Values values(const uint8_t* p) { return values(four(p)); }
  template <int C>
  static Values group_values(const uint8_t* p, int64_t k) {
    return values(fours_of_groups<C>(p, k));
  }
  static Values values(__m512i bytes) {
    return {_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(bytes, 8)};
  }
  static Weights weights(const int8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
  }
  static Ints dot(Ints sums, const Values& x, const Weights& w) {
    const __m512i even = _mm512_madd_epi16(x.even, w.even), odd = _mm512_madd_epi16(x.odd, w.odd);
    return _mm512_add_epi32(_mm512_add_epi32(sums, even), odd);
  }

  struct WithWideWeights;
  // The same words in memory.
  struct Wide : Avx512Singles {
    static Ints dot(Ints sums, Values x, Weights w) { return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w)); }
  };
  // Bytes, two products of which fit a word.
  struct SmallPairs : Avx512Singles {
    static Ints dot(Ints sums, Values x, Weights w) {
      return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(x, w), _mm512_set1_epi16(1)));
    }
  };
  static bool has_small_pairs(const uint8_t* p, int64_t n) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i greatest = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + N <= n; k += N)
      greatest = _mm512_max_epi16(greatest, _mm512_maddubs_epi16(_mm512_loadu_si512(p + 4 * k), one));
    if (k < n) greatest = _mm512_max_epi16(greatest, _mm512_maddubs_epi16(some(p + 4 * k, n - k), one));
    return _mm512_cmpgt_epi16_mask(greatest, _mm512_set1_epi16(256)) == 0;
  }
  // Of 4 N bytes.
  static void widen_values(const uint8_t* p, uint8_t* even, uint8_t* odd) {
    store_both(values(_mm512_loadu_si512(p)), even, odd);
  }
  static void widen_some_values(const uint8_t* p, int64_t n, uint8_t* even, uint8_t* odd) {
    store_both(values(some(p, n)), even, odd);
  }
  static void widen_weights(const int8_t* p, uint8_t* even, uint8_t* odd) { store_both(weights(p), even, odd); }

 private:
  // 4 n bytes, and zeros.
  static __m512i some(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p);
  }
  static void store_both(const Values& x, uint8_t* even, uint8_t* odd) {
    _mm512_storeu_si512(even, x.even);
    _mm512_storeu_si512(odd, x.odd);
  }
};

struct Avx512Dot::WithWideWeights : Avx512Dot {
  static Weights weights(const int8_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 4 * N)}; }
};

#if defined(__AVX512VNNI__)

struct Avx512VnniDot : Avx512Singles {
  static constexpr int kMostSpread = 16;
  static Ints dot(Ints sums, Values x, Weights w) { return _mm512_dpbusd_epi32(sums, x, w); }
};

#endif

}  // namespace
}  // namespace fastquant
