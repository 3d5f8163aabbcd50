// One byte, with the interface of bytes.h.
#pragma once

#include "../vec_scalar.h"

namespace fastquant {
namespace {

struct ScalarBytes {
  static constexpr int N = 1;
  static constexpr int kParts = 1, kHalves = 1;
  using Reg = uint8_t;
  using Floats = Scalar<float>;
  using Words = int32_t;
  using Ints = int32_t;

  static Reg set1(uint8_t b) { return b; }
  static Reg load(const uint8_t* p) { return *p; }
  static void store(uint8_t* p, Reg x) { *p = x; }
  static Reg load_some(const uint8_t*, int64_t) { return 0; }
  static void store_some(uint8_t*, Reg, int64_t) {}
  static Reg flip(Reg a, Reg b) { return static_cast<Reg>(a ^ b); }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }

  static float center_of(int zero_point) { return static_cast<float>(zero_point); }
  static Words words1(int x) { return x; }
  static void widen(Reg x, float center, float* y) { *y = static_cast<float>(x) - center; }
  static Reg narrow(const float* y, Words zero_point) {
    constexpr float kBeyond = 0x1p15f;
    const float limited = Floats::max(Floats::min(*y, kBeyond), -kBeyond);
    const int32_t q = static_cast<int32_t>(Floats::round(limited)) + zero_point;
    return static_cast<Reg>(q < 0 ? 0 : q > 255 ? 255 : q);
  }
  static Reg narrow_few(const float* y, Words zero_point) { return narrow(y, zero_point); }
  static void add_bytes(Reg x, Words* words) { *words += x; }
  static void squares(Reg x, Words* words) { *words = x * x; }
  static void add_words(const Words* words, Ints* ints) { *ints += *words; }
  static float to_float(Ints x) { return static_cast<float>(x); }
  static Ints ints1(int32_t x) { return x; }
  static Ints sub(Ints a, Ints b) { return a - b; }
  static Words add(Words a, Words b) { return a + b; }

  static void load_centered(const uint8_t* p, Reg f, float center, float* y) { widen(flip(*p, f), center, y); }
  static Reg narrow_in_order(const float* y, Words zero_point) { return narrow(y, zero_point); }
  static void store_ints(int32_t* p, Ints x) { *p = x; }
  static constexpr int index_of(int part, int i) { return part * Floats::N + i; }
  static void transpose(const uint8_t* p, int64_t s, uint8_t* out, int64_t t) {
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 16; ++c) out[c * t + r] = p[r * s + c];
    }
  }
  static void interleave3(const uint8_t* p, int64_t s, uint8_t* out) {
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 16; ++c) out[3 * c + r] = p[r * s + c];
    }
  }

  static float floats_of_bytes(const uint8_t* p) { return *p; }
  static float floats_of_nibbles(const uint8_t* p, int64_t i) {
    return static_cast<float>(p[i / 2] >> (4 * (i % 2)) & 15);
  }

  static constexpr bool kLooksUpFast = true;
  struct Table {
    explicit Table(const uint8_t* entries) : data(entries) {}
    const uint8_t* data;
  };
  static Reg look_up(const Table& table, Reg x) { return table.data[x]; }
};

}  // namespace
}  // namespace fastquant
