// Vectors of 16 bytes of NEON, for depthwise kernels; with the dot-product instructions where it is compiled
// for them. Values of x are taken as signed.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace fastquant {
namespace {

struct NeonTaps {
  static constexpr int kLanes = 1;
  static constexpr int kTile = 4;
  static constexpr bool kSigned = true;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr bool kOneInstruction = true;  // of `dot`
#else
  static constexpr bool kOneInstruction = false;
#endif
  using Bytes = uint8x16_t;
  using Column = int8x16_t;  // in each 32 bits, four taps of a channel
  using Ints = int32x4_t;
  using Words = int16x8_t;
  using Floats = float32x4_t;

  static Bytes set1(uint8_t x) { return vdupq_n_u8(x); }
  template <int G>
  static Bytes load(const uint8_t* p, int64_t) {
    return vld1q_u8(p);
  }
  template <int G>
  static Bytes load(const uint8_t* const* p) {
    return vld1q_u8(p[0]);
  }
  template <int G>
  static void store(uint8_t* p, int64_t, Bytes x) {
    vst1q_u8(p, x);
  }
  static Bytes exclusive_or(Bytes a, Bytes b) { return veorq_u8(a, b); }
  static Bytes max(Bytes a, Bytes b) { return vmaxq_u8(a, b); }

  static void interleave(const Bytes* row, Column* out) {
    const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(row[0], row[1]));
    const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(row[0], row[1]));
    const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(row[2], row[3]));
    const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(row[2], row[3]));
    out[0] = vreinterpretq_s8_u16(vzip1q_u16(low01, low23));
    out[1] = vreinterpretq_s8_u16(vzip2q_u16(low01, low23));
    out[2] = vreinterpretq_s8_u16(vzip1q_u16(high01, high23));
    out[3] = vreinterpretq_s8_u16(vzip2q_u16(high01, high23));
  }
  static void interleave_weights(const Bytes* row, Column* out) { interleave(row, out); }

#if defined(__ARM_FEATURE_DOTPROD)
  using Sums = int32x4_t;
  static Sums zero() { return vdupq_n_s32(0); }
  static Sums load_sums(const int32_t* p) { return vld1q_s32(p); }
  static Sums negative(Sums x) { return vnegq_s32(x); }
  static Sums dot(Sums sums, Column a, Column b) { return vdotq_s32(sums, a, b); }
  static int32x4_t total(Sums x) { return x; }
#else
  // Of each channel, the sums of taps 0 and 1 and of taps 2 and 3; the first two channels, and the others.
  struct Sums {
    int32x4_t low, high;
  };
  static Sums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static Sums load_sums(const int32_t* p) {
    const int32x4_t x = vld1q_s32(p), none = vdupq_n_s32(0);
    return {vzip1q_s32(x, none), vzip2q_s32(x, none)};
  }
  static Sums negative(Sums x) { return {vnegq_s32(x.low), vnegq_s32(x.high)}; }
  static Sums dot(Sums sums, Column a, Column b) {
    return {vpadalq_s16(sums.low, vmull_s8(vget_low_s8(a), vget_low_s8(b))),
            vpadalq_s16(sums.high, vmull_high_s8(a, b))};
  }
  static int32x4_t total(Sums x) { return vpaddq_s32(x.low, x.high); }
#endif
  static void store_sums(int32_t* p, Sums x) { vst1q_s32(p, total(x)); }

  static Floats set1_float(float x) { return vdupq_n_f32(x); }
  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static Floats to_floats(Sums x) { return vcvtq_f32_s32(total(x)); }
  static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats add_floats(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats min_floats(Floats a, Floats b) { return vminnmq_f32(a, b); }
  static Ints round(Floats x) { return vcvtnq_s32_f32(x); }

  static Words set1_word(int32_t x) { return vdupq_n_s16(static_cast<int16_t>(x)); }
  static Words words(Ints a, Ints b) { return vqmovn_high_s32(vqmovn_s32(a), b); }
  static Words add(Words a, Words b) { return vqaddq_s16(a, b); }
  static Bytes bytes(Words a, Words b) { return vqmovun_high_s16(vqmovun_s16(a), b); }
};

}  // namespace
}  // namespace fastquant
