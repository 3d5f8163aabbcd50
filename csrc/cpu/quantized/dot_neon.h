// Products and sums in NEON, with and without its dot product: the interface of kernels/matrix-inl.h and
// kernels/output-inl.h. Their factors are signed: 128 is subtracted from each value.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace fastquant {
namespace {

struct NeonLanes {
  static constexpr int N = 4;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static Ints load(const int32_t* p) { return vld1q_s32(p); }
  static Floats load(const float* p) { return vld1q_f32(p); }
  static void store(int32_t* p, Ints x) { vst1q_s32(p, x); }
  static void store(float* p, Floats x) { vst1q_f32(p, x); }
  static Ints set1(int32_t x) { return vdupq_n_s32(x); }
  static Floats set1(float x) { return vdupq_n_f32(x); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
  static Ints to_ints(Floats x) { return vcvtnq_s32_f32(x); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  // Unlike vminq and vmaxq, which give NaN where either is NaN.
  static Floats min(Floats a, Floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Floats max(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

  struct Limits {
    int16x8_t zero_point;
    uint8x8_t low, flip;
  };
  static Limits limits(int32_t zero_point, uint8_t low, uint8_t flip) {
    return {vdupq_n_s16(static_cast<int16_t>(zero_point)), vdup_n_u8(low), vdup_n_u8(flip)};
  }
  template <int kVectors>
  static void store_bytes(uint8_t* p, const Ints (&x)[kVectors], const Limits& limits, int64_t count) {
    for (int v = 0; v < kVectors; v += 2) {
      const uint8x8_t y = bytes(x[v], x[v + 1 < kVectors ? v + 1 : v], limits);
      const int64_t left = count - v * N;
      if (left >= 2 * N) {
        vst1_u8(p + v * N, y);
      } else {
        uint8_t all[2 * N];
        vst1_u8(all, y);
        for (int64_t i = 0; i < left; ++i) p[v * N + i] = all[i];
      }
    }
  }

  static void store_bfloat16(uint16_t* p, Floats x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, last), vdupq_n_u32(0x7fff));
    const uint32x4_t kept = vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
    vst1_u16(p, vshrn_n_u32(kept, 16));
  }

  static int8x16_t four(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(bytes)), vdupq_n_u8(0x80)));
  }

  static constexpr int64_t kValueOffset = 128;
  static constexpr int kSums = 8;
  static constexpr int kMostSpread = 0;

 private:
  static uint8x8_t bytes(Ints a, Ints b, const Limits& limits) {
    const int16x8_t words = vqaddq_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), limits.zero_point);
    return veor_u8(vmax_u8(vqmovun_s16(words), limits.low), limits.flip);
  }
};

struct NeonDot : NeonLanes {
  static constexpr int kMostVectors = 4;
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 4   ? 4
                                   : kVectors == 3 ? 4
                                                   : 6;
  using Values = int8x16_t;
  using Weights = int8x16_t;
  static Values values(const uint8_t* p) { return four(p); }
  static Weights weights(const int8_t* p) { return vld1q_s8(p); }
  // The products of two channels each, as words, none of which overflows; then the sums of pairs of pairs.
  static Ints dot(Ints sums, Values x, Weights w) {
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w)), high = vmull_high_s8(x, w);
    return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
};

#if defined(__ARM_FEATURE_DOTPROD)

struct NeonDotProduct : NeonDot {
  template <int kVectors>
  static constexpr int kMostRows = kVectors == 4   ? 5
                                   : kVectors == 3 ? 6
                                                   : 8;
  static Ints dot(Ints sums, Values x, Weights w) { return vdotq_s32(sums, x, w); }
};

#endif

}  // namespace
}  // namespace fastquant
