// Vectors of bytes of NEON of 64-bit Arm, with the interface of bytes.h.
#pragma once

#include "../vec_neon.h"

namespace fastquant {
namespace {

struct NeonBytes {
  static constexpr int N = 16;
  static constexpr int kParts = 4, kHalves = 2;
  using Reg = uint8x16_t;
  using Floats = Neon<float>;
  using Words = uint16x8_t;
  using Ints = int32x4_t;

  static Reg set1(uint8_t b) { return vdupq_n_u8(b); }
  static Reg load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(uint8_t* p, Reg x) { vst1q_u8(p, x); }
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
  static Reg flip(Reg a, Reg b) { return veorq_u8(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_u8(a, b); }
  static Reg max(Reg a, Reg b) { return vmaxq_u8(a, b); }

  static float32x4_t center_of(int zero_point) { return vdupq_n_f32(static_cast<float>(zero_point)); }
  static Words words1(int x) { return vreinterpretq_u16_s16(vdupq_n_s16(static_cast<int16_t>(x))); }
  static void widen(Reg x, float32x4_t center, float32x4_t* y) {
    const uint16x8_t w[] = {vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x)};
    for (int k = 0; k < 2; ++k) {
      y[2 * k] = vsubq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(w[k]))), center);
      y[2 * k + 1] = vsubq_f32(vcvtq_f32_u32(vmovl_high_u16(w[k])), center);
    }
  }
  static Reg narrow(const float32x4_t* y, Words zero_point) {
    // The conversion saturates; only NaN, which it takes for 0, needs the limit.
    const float32x4_t most = vdupq_n_f32(0x1p20f);
    int16x4_t q[4];
    for (int k = 0; k < 4; ++k) q[k] = vqmovn_s32(vcvtnq_s32_f32(Floats::min(y[k], most)));
    const int16x8_t z = vreinterpretq_s16_u16(zero_point);
    const int16x8_t low = vqaddq_s16(vcombine_s16(q[0], q[1]), z);
    const int16x8_t high = vqaddq_s16(vcombine_s16(q[2], q[3]), z);
    return vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
  }
  static Reg narrow_few(const float32x4_t* y, Words zero_point) { return narrow(y, zero_point); }
  static void add_bytes(Reg x, Words* words) {
    words[0] = vaddw_u8(words[0], vget_low_u8(x));
    words[1] = vaddw_high_u8(words[1], x);
  }
  static void squares(Reg x, Words* words) {
    words[0] = vmull_u8(vget_low_u8(x), vget_low_u8(x));
    words[1] = vmull_high_u8(x, x);
  }
  static void add_words(const Words* words, Ints* ints) {
    for (int k = 0; k < 2; ++k) {
      ints[2 * k] = sum(ints[2 * k], vget_low_u16(words[k]));
      ints[2 * k + 1] = sum(ints[2 * k + 1], vget_high_u16(words[k]));
    }
  }
  static float32x4_t to_float(Ints x) { return vcvtq_f32_s32(x); }
  static Ints ints1(int32_t x) { return vdupq_n_s32(x); }
  static Ints sub(Ints a, Ints b) { return vsubq_s32(a, b); }
  static Words add(Words a, Words b) { return vaddq_u16(a, b); }

  // widen() and narrow() keep the order of memory.
  static void load_centered(const uint8_t* p, Reg f, float32x4_t center, float32x4_t* y) {
    widen(flip(load(p), f), center, y);
  }
  static Reg narrow_in_order(const float32x4_t* y, Words zero_point) { return narrow(y, zero_point); }
  static void store_ints(int32_t* p, Ints x) { vst1q_s32(p, x); }
  static constexpr int index_of(int part, int i) { return part * Floats::N + i; }
  static void transpose(const uint8_t* p, int64_t s, uint8_t* out, int64_t t) {
    Reg a[16], b[16];
    for (int k = 0; k < 16; ++k) a[k] = load(p + k * s);
    // Each round interleaves the vectors k and k + 8. After four, element (r, c) has moved to (c, r).
    for (int round = 0; round < 4; ++round) {
      for (int k = 0; k < 8; ++k) {
        b[2 * k] = vzip1q_u8(a[k], a[k + 8]);
        b[2 * k + 1] = vzip2q_u8(a[k], a[k + 8]);
      }
      for (int k = 0; k < 16; ++k) a[k] = b[k];
    }
    for (int k = 0; k < 16; ++k) store(out + k * t, a[k]);
  }
  static void interleave3(const uint8_t* p, int64_t s, uint8_t* out) {
    vst3q_u8(out, {load(p), load(p + s), load(p + 2 * s)});
  }

  static float32x4_t floats_of_bytes(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
  }
  // Every lane gets the same two bytes, and takes its own bits of them.
  static float32x4_t floats_of_nibbles(const uint8_t* p, int64_t i) {
    uint16_t four;
    __builtin_memcpy(&four, p + i / 2, sizeof four);
    const int32_t shifts[] = {0, -4, -8, -12};
    const uint32x4_t own = vshlq_u32(vdupq_n_u32(four), vld1q_s32(shifts));
    return vcvtq_f32_u32(vandq_u32(own, vdupq_n_u32(15)));
  }

  static constexpr bool kLooksUpFast = true;
  struct Table {
    explicit Table(const uint8_t* entries) {
      for (int k = 0; k < 4; ++k) rows[k] = vld1q_u8_x4(entries + 64 * k);
    }
    uint8x16x4_t rows[4];
  };
  static Reg look_up(const Table& table, Reg x) {
    // An index beyond 63 finds 0, or leaves what was found before.
    Reg found = vqtbl4q_u8(table.rows[0], x);
    for (int k = 1; k < 4; ++k) {
      found = vqtbx4q_u8(found, table.rows[k], vsubq_u8(x, set1(static_cast<uint8_t>(64 * k))));
    }
    return found;
  }

 private:
  static Ints sum(Ints a, uint16x4_t b) {
    return vreinterpretq_s32_u32(vaddw_u16(vreinterpretq_u32_s32(a), b));
  }
};

}  // namespace
}  // namespace fastquant
