// Vectors of NEON of 64-bit Arm, with the interface of ../math/vector.h.
#pragma once

#include <arm_neon.h>

#include "../math/numbers.h"

namespace fastquant {
namespace {

// 16-bit integers.
struct NeonWords {
  static constexpr int N = 8;
  using Reg = uint16x8_t;

  static Reg set1(int x) { return vdupq_n_u16(static_cast<uint16_t>(x)); }
  static Reg load(const void* p) { return vld1q_u16(static_cast<const uint16_t*>(p)); }
  static void store(void* p, Reg x) { vst1q_u16(static_cast<uint16_t*>(p), x); }
  static Reg min(Reg a, Reg b) { return vreinterpretq_u16_s16(vminq_s16(as_signed(a), as_signed(b))); }
  static Reg max(Reg a, Reg b) { return vreinterpretq_u16_s16(vmaxq_s16(as_signed(a), as_signed(b))); }
  static Reg max_unsigned(Reg a, Reg b) { return vmaxq_u16(a, b); }
  static Reg where_negative(Reg sign, Reg yes, Reg no) {
    return vbslq_u16(vcltq_s16(as_signed(sign), vdupq_n_s16(0)), yes, no);
  }
  static int lowest(Reg x) { return vminvq_s16(as_signed(x)); }
  static int highest(Reg x) { return vmaxvq_s16(as_signed(x)); }
  static int highest_unsigned(Reg x) { return vmaxvq_u16(x); }

 private:
  static int16x8_t as_signed(Reg x) { return vreinterpretq_s16_u16(x); }
};

template <class T>
struct Neon;

template <>
struct Neon<float> {
  static constexpr int N = 4;
  using Element = float;
  using Reg = float32x4_t;
  using Words = NeonWords;
  using Mask = uint32x4_t;
  static constexpr bool kAlternates = false;

  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static Reg load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static void store(Half* p, Reg x) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
  static void store(BFloat16* p, Reg x) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(rounded_bits(x), 16));
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
  static Reg rounded_to(const float*, Reg x) { return x; }
  static Reg rounded_to(const Half*, Reg x) { return vcvt_f32_f16(vcvt_f16_f32(x)); }
  static Reg rounded_to(const BFloat16*, Reg x) {
    return vreinterpretq_f32_u32(vandq_u32(rounded_bits(x), vdupq_n_u32(0xffff0000u)));
  }
  static constexpr bool kStoresOthers = false;
  static void store_index(int32_t* p, Reg x) { vst1q_s32(p, vcvtq_s32_f32(x)); }

  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  // vminq and vmaxq are not used, because they return NaN if either argument is NaN.
  static Reg min(Reg a, Reg b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Reg even(Reg a, Reg b) { return vuzp1q_f32(a, b); }
  static Reg odd(Reg a, Reg b) { return vuzp2q_f32(a, b); }
  static Reg zip_low(Reg a, Reg b) { return vzip1q_f32(a, b); }
  static Reg zip_high(Reg a, Reg b) { return vzip2q_f32(a, b); }
  static float lowest(Reg x) { return vminvq_f32(x); }
  static float highest(Reg x) { return vmaxvq_f32(x); }
  static Reg madd(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg nmadd(Reg a, Reg b, Reg c) { return vfmsq_f32(c, a, b); }
  // x / 3 without a division: multiplying by the rounded 1 / 3 gives a quotient with an error below one unit in
  // the last place, and adding a third of the remainder rounds it correctly (Markstein,
  // https://doi.org/10.1147/rd.341.0111).
  static Reg third(Reg x) {
    const Reg inverse = set1(1.0f / 3.0f);
    const Reg quotient = mul(x, inverse);
    return vfmaq_f32(quotient, nmadd(quotient, set1(3.0f), x), inverse);
  }
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static Reg floor(Reg x) { return vrndmq_f32(x); }

  static Mask lt(Reg a, Reg b) { return vcltq_f32(a, b); }
  static Mask le(Reg a, Reg b) { return vcleq_f32(a, b); }
  static Mask not_lt(Reg a, Reg b) { return vmvnq_u32(lt(a, b)); }
  static Mask not_le(Reg a, Reg b) { return vmvnq_u32(le(a, b)); }
  static Mask unordered(Reg a, Reg b) { return vmvnq_u32(vandq_u32(vceqq_f32(a, a), vceqq_f32(b, b))); }
  static Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
  static Mask either(Mask a, Mask b) { return vorrq_u32(a, b); }
  static Mask none() { return vdupq_n_u32(0); }
  static bool any(Mask m) { return vmaxvq_u32(m) != 0; }
  static uint32_t bits(Mask m) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
  }
  static Mask from_bits(uint32_t bits) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(weights));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return vbslq_f32(m, yes, no); }

 private:
  // Rounds each lane to the nearest bfloat16, ties to even, in its upper 16 bits.
  static uint32x4_t rounded_bits(Reg x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
  }
};

template <>
struct Neon<double> {
  static constexpr int N = 2;
  using Element = double;
  using Reg = float64x2_t;
  using Mask = uint64x2_t;

  static Reg set1(double x) { return vdupq_n_f64(x); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static Reg load(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + N);
  }
  static void store(double* p, Reg x) { vst1q_f64(p, x); }
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
  static void store_index(int32_t* p, Reg x) { vst1_s32(p, vmovn_s64(vcvtq_s64_f64(x))); }

  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static Reg min(Reg a, Reg b) { return vbslq_f64(vcltq_f64(a, b), a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
  static double lowest(Reg x) { return vminvq_f64(x); }
  static double highest(Reg x) { return vmaxvq_f64(x); }
  static Reg round(Reg x) { return vrndnq_f64(x); }

  static Mask lt(Reg a, Reg b) { return vcltq_f64(a, b); }
  static Mask le(Reg a, Reg b) { return vcleq_f64(a, b); }
  static Mask not_lt(Reg a, Reg b) { return negated(lt(a, b)); }
  static Mask not_le(Reg a, Reg b) { return negated(le(a, b)); }
  static Mask unordered(Reg a, Reg b) { return negated(vandq_u64(vceqq_f64(a, a), vceqq_f64(b, b))); }
  static Mask both(Mask a, Mask b) { return vandq_u64(a, b); }
  static Mask either(Mask a, Mask b) { return vorrq_u64(a, b); }
  static Mask none() { return vdupq_n_u64(0); }
  static bool any(Mask m) { return (vgetq_lane_u64(m, 0) | vgetq_lane_u64(m, 1)) != 0; }
  static uint32_t bits(Mask m) {
    return static_cast<uint32_t>((vgetq_lane_u64(m, 0) & 1u) | (vgetq_lane_u64(m, 1) & 2u));
  }
  static Mask from_bits(uint32_t bits) {
    const uint64_t weights[2] = {1, 2};
    return vtstq_u64(vdupq_n_u64(bits), vld1q_u64(weights));
  }
  static Reg select(Mask m, Reg yes, Reg no) { return vbslq_f64(m, yes, no); }

 private:
  static Mask negated(Mask m) { return veorq_u64(m, vdupq_n_u64(~uint64_t{0})); }
};

}  // namespace
}  // namespace fastquant
