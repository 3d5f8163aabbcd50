// Products and sums in AVX2, with and without VNNI: the interface of kernels/matrix-inl.h and
// kernels/output-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastquant {
namespace {

struct Avx2Lanes {
  static constexpr int N = 8;
  using Ints = __m256i;
  using Floats = __m256;

  static Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  static Ints set1(int32_t x) { return _mm256_set1_epi32(x); }
  static Floats set1(float x) { return _mm256_set1_ps(x); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Ints to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }

  struct Limits {
    __m256i zero_point, low, flip;
  };
  static Limits limits(int32_t zero_point, uint8_t low, uint8_t flip) {
    return {_mm256_set1_epi16(static_cast<int16_t>(zero_point)), _mm256_set1_epi8(static_cast<char>(low)),
            _mm256_set1_epi8(static_cast<char>(flip))};
  }
  template <int kVectors>
  static void store_bytes(uint8_t* p, const Ints (&x)[kVectors], const Limits& limits, int64_t count) {
    const Ints& last = x[kVectors - 1];
    const __m256i low = words(x[0], kVectors > 1 ? x[1] : last, limits);
    const __m256i high = kVectors > 2 ? words(x[kVectors > 2 ? 2 : 0], last, limits) : low;
    // Each group of 16 bytes has four of every vector.
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    const __m256i y = _mm256_xor_si256(_mm256_max_epu8(bytes, limits.low), limits.flip);
    const __m128i first = _mm256_castsi256_si128(y);
    if (count < N * kVectors) {
      alignas(32) uint8_t all[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(all), y);
      for (int64_t i = 0; i < count; ++i) p[i] = all[i];
    } else if constexpr (kVectors == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), y);
    } else if constexpr (kVectors == 1) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), first);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), first);
      if constexpr (kVectors == 3) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 16), _mm256_extracti128_si256(y, 1));
      }
    }
  }

  static void store_bfloat16(uint16_t* p, Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, last), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i upper = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // Sums of products are added to in the order of the code: a compiler that adds products to each other first
  // needs more registers than there are.
  static Ints in_order(Ints sums) {
    __asm__("" : "+x"(sums));
    return sums;
  }

  static __m256i four(const void* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
  // Groups of 4 channels: the four values of the first for the lower half, those of the second for the upper.
  static __m256i fours_of_groups(const uint8_t* p) {
    int64_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const __m256i order =
        _mm256_set_epi64x(0x0706050407060504, 0x0706050407060504, 0x0302010003020100, 0x0302010003020100);
    return _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), order);
  }

  static constexpr int64_t kValueOffset = 0;
  static constexpr int kSums = 8;
  static constexpr int kMostSpread = 4;

 private:
  static __m256i words(Ints a, Ints b, const Limits& limits) {
    return _mm256_adds_epi16(_mm256_packs_epi32(a, b), limits.zero_point);
  }
};

// Values and weights that take one register each.
struct Avx2Singles : Avx2Lanes {
  static constexpr int kMostVectors = 4;
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 4   ? 3
                                   : kVectors == 3 ? 4
                                   : kVectors == 2 ? 6
                                                   : 8;
  using Values = __m256i;
  using Weights = __m256i;
  static Values values(const uint8_t* p) { return four(p); }
  template <int C>
  static Values group_values(const uint8_t* p, int64_t) {
    return fours_of_groups(p);
  }
  static Weights weights(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
};

// Bytes as words, of which two are multiplied and added at once: the first and third of four, the second and
// fourth.
struct Avx2Dot : Avx2Lanes {
  static constexpr int kMostVectors = 2;
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 2 ? 4 : 6;
  struct Values {
    __m256i even, odd;
  };
  using Weights = Values;
  static Values values(const uint8_t* p) { return values(four(p)); }
  template <int C>
  static Values group_values(const uint8_t* p, int64_t) {
    return values(fours_of_groups(p));
  }
  static Values values(__m256i bytes) {
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(bytes, 8)};
  }
  static Weights weights(const int8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static Ints dot(Ints sums, const Values& x, const Weights& w) {
    const __m256i even = _mm256_madd_epi16(x.even, w.even), odd = _mm256_madd_epi16(x.odd, w.odd);
    return in_order(_mm256_add_epi32(_mm256_add_epi32(sums, even), odd));
  }

  struct WithWideWeights;
  // The same words in memory.
  struct Wide : Avx2Singles {
    static Ints dot(Ints sums, Values x, Weights w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
  };
  // Bytes, two products of which fit a word.
  struct SmallPairs : Avx2Singles {
    static Ints dot(Ints sums, Values x, Weights w) {
      return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
    }
  };
  static bool has_small_pairs(const uint8_t* p, int64_t n) {
    const __m256i one = _mm256_set1_epi8(1);
    __m256i greatest = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + N <= n; k += N) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * k));
      greatest = _mm256_max_epi16(greatest, _mm256_maddubs_epi16(bytes, one));
    }
    if (k < n) greatest = _mm256_max_epi16(greatest, _mm256_maddubs_epi16(some(p + 4 * k, n - k), one));
    const __m256i above = _mm256_cmpgt_epi16(greatest, _mm256_set1_epi16(256));
    return _mm256_testz_si256(above, above) != 0;
  }
  // Of 4 N bytes.
  static void widen_values(const uint8_t* p, uint8_t* even, uint8_t* odd) {
    store_both(values(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), even, odd);
  }
  static void widen_some_values(const uint8_t* p, int64_t n, uint8_t* even, uint8_t* odd) {
    store_both(values(some(p, n)), even, odd);
  }
  static void widen_weights(const int8_t* p, uint8_t* even, uint8_t* odd) { store_both(weights(p), even, odd); }

 private:
  // 4 n bytes, and zeros.
  static __m256i some(const uint8_t* p, int64_t n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), index);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), there);
  }
  static void store_both(const Values& x, uint8_t* even, uint8_t* odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), x.even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), x.odd);
  }
};

struct Avx2Dot::WithWideWeights : Avx2Dot {
  static Weights weights(const int8_t* p) { return {Avx2Singles::weights(p), Avx2Singles::weights(p + 4 * N)}; }
};

#if defined(__AVXVNNI__)

struct AvxVnniDot : Avx2Singles {
  static Ints dot(Ints sums, Values x, Weights w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
};

#endif

}  // namespace
}  // namespace fastquant
