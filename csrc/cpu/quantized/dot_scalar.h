// Products and sums of one channel at a time: the interface of kernels/matrix-inl.h and kernels/output-inl.h on
// any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastquant {
namespace {

struct ScalarDot {
  static constexpr int N = 1;
  using Ints = int32_t;
  using Floats = float;

  static Ints load(const int32_t* p) { return *p; }
  static Floats load(const float* p) { return *p; }
  static void store(int32_t* p, Ints x) { *p = x; }
  static void store(float* p, Floats x) { *p = x; }
  static Ints set1(int32_t x) { return x; }
  static Floats set1(float x) { return x; }
  static Ints add(Ints a, Ints b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static Floats to_floats(Ints x) { return static_cast<float>(x); }
  static Ints to_ints(Floats x) {
    return x < -2147483648.0f ? INT32_MIN : static_cast<int32_t>(__builtin_nearbyintf(x));
  }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats min(Floats a, Floats b) { return a < b ? a : b; }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  struct Limits {
    int32_t zero_point, low;
    uint8_t flip;
  };
  static Limits limits(int32_t zero_point, uint8_t low, uint8_t flip) { return {zero_point, low, flip}; }
  template <int kVectors>
  static void store_bytes(uint8_t* p, const Ints (&x)[kVectors], const Limits& limits, int64_t) {
    for (int v = 0; v < kVectors; ++v) {
      const int32_t y = x[v] + limits.zero_point;
      p[v] = static_cast<uint8_t>((y > limits.low ? y : limits.low) ^ limits.flip);
    }
  }
  static void store_bfloat16(uint16_t* p, Floats x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *p = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  static constexpr int64_t kValueOffset = 0;
  static constexpr int kMostVectors = 4;
  template <int kVectors>
  static constexpr int kMostRows = 2;
  static constexpr int kSums = 8;
  static constexpr int kMostSpread = 0;
  struct Values {
    int32_t of[4];
  };
  using Weights = Values;
  static Values values(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Weights weights(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Ints dot(Ints sum, const Values& x, const Weights& w) {
    return add(sum, x.of[0] * w.of[0] + x.of[1] * w.of[1] + x.of[2] * w.of[2] + x.of[3] * w.of[3]);
  }
};

}  // namespace
}  // namespace fastquant
