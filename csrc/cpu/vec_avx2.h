// Vectors of AVX2 with FMA and F16C, with the interface of ../math/vector.h.
#pragma once

#include <immintrin.h>

#include "../math/numbers.h"

namespace fastquant {
namespace {

// 16-bit integers.
struct Avx2Words {
  static constexpr int N = 16;
  using Reg = __m256i;

  static Reg set1(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static Reg load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Reg x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static Reg min(Reg a, Reg b) { return _mm256_min_epi16(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_epi16(a, b); }
  static Reg max_unsigned(Reg a, Reg b) { return _mm256_max_epu16(a, b); }
  static Reg where_negative(Reg sign, Reg yes, Reg no) {
    return _mm256_blendv_epi8(no, yes, _mm256_srai_epi16(sign, 15));
  }
  static int lowest(Reg x) { return least_unsigned(_mm256_xor_si256(x, set1(-0x8000))) - 0x8000; }
  static int highest(Reg x) { return 0x7fff - least_unsigned(_mm256_xor_si256(x, set1(0x7fff))); }
  static int highest_unsigned(Reg x) { return 0xffff - least_unsigned(_mm256_xor_si256(x, set1(-1))); }

 private:
  static int least_unsigned(Reg x) {
    const __m128i rest = _mm_min_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return _mm_extract_epi16(_mm_minpos_epu16(rest), 0);
  }
};

template <class T>
struct Avx2;

template <>
struct Avx2<float> {
  static constexpr int N = 8;
  using Element = float;
  using Reg = __m256;
  using Words = Avx2Words;
  using Mask = __m256;
  static constexpr bool kAlternates = true;

  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Reg load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void load_pair(const BFloat16* p, Reg* a, Reg* b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void store(Half* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, Reg x) {
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded_bits(x), _mm256_set1_epi32(0x7fc00000), nan);
    const __m256i halves = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  template <class Stored>
  static void store_pair_normal(Stored* p, Reg a, Reg b) {
    store(p, a);
    store(p + N, b);
  }
  template <class Stored>
  static uint32_t pair_bits(const Stored*, Mask a, Mask b) {
    return bits(a) | bits(b) << N;
  }
  static void store_pair_normal(BFloat16* p, Reg even, Reg odd) {
    const __m256i low = _mm256_srli_epi32(rounded_bits(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, rounded_bits(odd), 0xaa));
  }
  static uint32_t pair_bits(const BFloat16*, Mask even, Mask odd) {
    const __m256i lanes = _mm256_blend_epi16(_mm256_castps_si256(even), _mm256_castps_si256(odd), 0xaa);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
  static Reg rounded_to(const float*, Reg x) { return x; }
  static Reg rounded_to(const Half*, Reg x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Reg rounded_to(const BFloat16*, Reg x) {
    const __m256i upper =
        _mm256_and_si256(rounded_bits(x), _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)));
    const Reg nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return select(unordered(x, x), nan, _mm256_castsi256_ps(upper));
  }
  static constexpr bool kStoresOthers = false;
  static void store_index(int32_t* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(x));
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg even(Reg a, Reg b) { return middle_swapped(_mm256_shuffle_ps(a, b, 0x88)); }
  static Reg odd(Reg a, Reg b) { return middle_swapped(_mm256_shuffle_ps(a, b, 0xdd)); }
  static Reg zip_low(Reg a, Reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static Reg zip_high(Reg a, Reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static float lowest(Reg x) {
    __m128 low = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    low = _mm_min_ps(low, _mm_movehl_ps(low, low));
    return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
  }
  static float highest(Reg x) {
    __m128 high = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    high = _mm_max_ps(high, _mm_movehl_ps(high, high));
    return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
  }
  static Reg madd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg nmadd(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
  // x / 3 without a division: multiplying by the rounded 1 / 3 gives a quotient with an error below one unit in
  // the last place, and adding a third of the remainder rounds it correctly (Markstein,
  // https://doi.org/10.1147/rd.341.0111).
  static Reg third(Reg x) {
    const Reg inverse = set1(1.0f / 3.0f);
    const Reg quotient = mul(x, inverse);
    return _mm256_fmadd_ps(nmadd(quotient, set1(3.0f), x), inverse, quotient);
  }
  static Reg round(Reg x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg floor(Reg x) { return _mm256_floor_ps(x); }

  static Mask lt(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask le(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static Mask not_lt(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static Mask not_le(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
  static Mask unordered(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Mask none() { return _mm256_setzero_ps(); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static Mask from_bits(uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), lanes);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm256_blendv_ps(no, yes, m); }

 private:
  // The second and third quarter have changed places.
  static Reg middle_swapped(Reg x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  }
  // Rounds each lane to the nearest bfloat16, ties to even, in its upper 16 bits. Does not support NaN.
  static __m256i rounded_bits(Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
};

template <>
struct Avx2<double> {
  static constexpr int N = 4;
  using Element = double;
  using Reg = __m256d;
  using Mask = __m256d;

  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void store(double* p, Reg x) { _mm256_storeu_pd(p, x); }
  template <class Stored>
  static void store_pair_normal(Stored* p, Reg a, Reg b) {
    store(p, a);
    store(p + N, b);
  }
  template <class Stored>
  static uint32_t pair_bits(const Stored*, Mask a, Mask b) {
    return bits(a) | bits(b) << N;
  }
  static Reg rounded_to(const double*, Reg x) { return x; }
  static constexpr bool kStoresOthers = false;
  static void store_index(int32_t* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvttpd_epi32(x));
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static double lowest(Reg x) {
    const __m128d low = _mm_min_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_min_sd(low, _mm_unpackhi_pd(low, low)));
  }
  static double highest(Reg x) {
    const __m128d high = _mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_max_sd(high, _mm_unpackhi_pd(high, high)));
  }
  static Reg round(Reg x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static Mask lt(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
  static Mask le(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_LE_OQ); }
  static Mask not_lt(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_NLT_UQ); }
  static Mask not_le(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_NLE_UQ); }
  static Mask unordered(Reg a, Reg b) { return _mm256_cmp_pd(a, b, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return _mm256_and_pd(a, b); }
  static Mask either(Mask a, Mask b) { return _mm256_or_pd(a, b); }
  static Mask none() { return _mm256_setzero_pd(); }
  static bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_pd(m)); }
  static Mask from_bits(uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lanes);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lanes));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm256_blendv_pd(no, yes, m); }
};

}  // namespace
}  // namespace fastquant
