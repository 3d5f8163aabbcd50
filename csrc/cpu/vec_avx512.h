// Vectors of AVX-512 F, BW, DQ and VL, with the interface of ../math/vector.h.
#pragma once

#include <immintrin.h>

#include "../math/numbers.h"

namespace fastquant {
namespace {

// 16-bit integers.
struct Avx512Words {
  static constexpr int N = 32;
  using Reg = __m512i;

  static Reg set1(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
  static Reg load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Reg x) { _mm512_storeu_si512(p, x); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epi16(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_epi16(a, b); }
  static Reg max_unsigned(Reg a, Reg b) { return _mm512_max_epu16(a, b); }
  static Reg where_negative(Reg sign, Reg yes, Reg no) {
    return _mm512_mask_blend_epi16(_mm512_movepi16_mask(sign), no, yes);
  }
  static int lowest(Reg x) { return least_unsigned(_mm512_xor_si512(x, set1(-0x8000))) - 0x8000; }
  static int highest(Reg x) { return 0x7fff - least_unsigned(_mm512_xor_si512(x, set1(0x7fff))); }
  static int highest_unsigned(Reg x) { return 0xffff - least_unsigned(_mm512_xor_si512(x, set1(-1))); }

 private:
  static int least_unsigned(Reg x) {
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i rest = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_extract_epi16(_mm_minpos_epu16(rest), 0);
  }
};

template <class T>
struct Avx512;

template <>
struct Avx512<float> {
  static constexpr int N = 16;
  using Element = float;
  using Reg = __m512;
  using Words = Avx512Words;
  using Mask = __mmask16;
  static constexpr bool kAlternates = true;

  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void load_pair(const BFloat16* p, Reg* a, Reg* b) {
    const __m512i both = _mm512_loadu_si512(p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void store(Half* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, Reg x) {
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded_bits(x), nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
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
    const __m512i low = _mm512_srli_epi32(rounded_bits(even), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_bits(odd)));
  }
  static uint32_t pair_bits(const BFloat16*, Mask even, Mask odd) {
    return _pdep_u32(even, 0x55555555u) | _pdep_u32(odd, 0xaaaaaaaau);
  }
  static Reg rounded_to(const float*, Reg x) { return x; }
  static Reg rounded_to(const Half*, Reg x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Reg rounded_to(const BFloat16*, Reg x) {
    const __m512i upper =
        _mm512_and_si512(rounded_bits(x), _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
    const __m512i nan = _mm512_set1_epi32(0x7fc00000);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(upper, unordered(x, x), nan));
  }
  static constexpr bool kStoresOthers = true;
  static int store_others(float* p, Mask dropped, Reg x) {
    const Mask kept = static_cast<Mask>(~dropped);
    store(p, _mm512_maskz_compress_ps(kept, x));
    return __builtin_popcount(kept);
  }
  static void store_index(int32_t* p, Reg x) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(x)); }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg even(Reg a, Reg b) { return _mm512_permutex2var_ps(a, every_second(0), b); }
  static Reg odd(Reg a, Reg b) { return _mm512_permutex2var_ps(a, every_second(1), b); }
  static Reg zip_low(Reg a, Reg b) { return _mm512_permutex2var_ps(a, alternating(0), b); }
  static Reg zip_high(Reg a, Reg b) { return _mm512_permutex2var_ps(a, alternating(8), b); }
  static float lowest(Reg x) { return _mm512_reduce_min_ps(x); }
  static float highest(Reg x) { return _mm512_reduce_max_ps(x); }
  static Reg madd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg nmadd(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
  // x / 3 without a division: multiplying by the rounded 1 / 3 gives a quotient with an error below one unit in
  // the last place, and adding a third of the remainder rounds it correctly (Markstein,
  // https://doi.org/10.1147/rd.341.0111).
  static Reg third(Reg x) {
    const Reg inverse = set1(1.0f / 3.0f);
    const Reg quotient = mul(x, inverse);
    return _mm512_fmadd_ps(nmadd(quotient, set1(3.0f), x), inverse, quotient);
  }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg floor(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

  static Mask lt(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask le(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static Mask eq(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask not_lt(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static Mask not_le(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static Mask unordered(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
  static Mask none() { return 0; }
  static bool any(Mask m) { return m != 0; }
  static uint32_t bits(Mask m) { return m; }
  static Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm512_mask_blend_ps(m, no, yes); }

 private:
  // Of two vectors: the elements first, first + 2, …; and first of one, first of the other, first + 1 of one,
  // ….
  static __m512i every_second(int first) {
    const __m512i twice = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_add_epi32(twice, _mm512_set1_epi32(first));
  }
  static __m512i alternating(int first) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_add_epi32(low, _mm512_set1_epi32(first));
  }
  // Rounds each lane to the nearest bfloat16, ties to even, in its upper 16 bits. Does not support NaN.
  static __m512i rounded_bits(Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i raised = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(raised, odd, raised, _mm512_set1_epi32(1));
  }
};

template <>
struct Avx512<double> {
  static constexpr int N = 8;
  using Element = double;
  using Reg = __m512d;
  using Mask = __mmask8;

  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void store(double* p, Reg x) { _mm512_storeu_pd(p, x); }
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
  static constexpr bool kStoresOthers = true;
  static int store_others(double* p, Mask dropped, Reg x) {
    const Mask kept = static_cast<Mask>(~dropped);
    store(p, _mm512_maskz_compress_pd(kept, x));
    return __builtin_popcount(kept);
  }
  static void store_index(int32_t* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvttpd_epi32(x));
  }

  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static double lowest(Reg x) { return _mm512_reduce_min_pd(x); }
  static double highest(Reg x) { return _mm512_reduce_max_pd(x); }
  static Reg round(Reg x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static Mask lt(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static Mask le(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
  static Mask eq(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
  static Mask not_lt(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ); }
  static Mask not_le(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
  static Mask unordered(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_UNORD_Q); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return _kor_mask8(a, b); }
  static Mask none() { return 0; }
  static bool any(Mask m) { return m != 0; }
  static uint32_t bits(Mask m) { return m; }
  static Mask from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
  static Reg select(Mask m, Reg yes, Reg no) { return _mm512_mask_blend_pd(m, no, yes); }
};

}  // namespace
}  // namespace fastquant
