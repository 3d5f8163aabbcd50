// Vectors of 16 bytes in portable C++, for depthwise kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "../vec_scalar.h"

namespace fastquant {
namespace {

struct ScalarTaps {
  static constexpr int kLanes = 1;
  static constexpr int kTile = 4;
  static constexpr bool kSigned = false;
  static constexpr bool kOneInstruction = false;
  struct Bytes {
    uint8_t at[16];
  };
  struct Column {  // channel c, tap t: at[c * 4 + t]
    int16_t at[16];
  };
  struct Sums {
    int32_t at[4];
  };
  using Ints = Sums;
  struct Words {
    int32_t at[8];
  };
  struct Floats {
    float at[4];
  };

  static Bytes set1(uint8_t x) {
    Bytes y;
    for (uint8_t& b : y.at) b = x;
    return y;
  }
  template <int G>
  static Bytes load(const uint8_t* p, int64_t) {
    Bytes y;
    std::memcpy(y.at, p, 16);
    return y;
  }
  template <int G>
  static Bytes load(const uint8_t* const* p) {
    return load<G>(p[0], 0);
  }
  template <int G>
  static void store(uint8_t* p, int64_t, Bytes x) {
    std::memcpy(p, x.at, 16);
  }
  static Bytes exclusive_or(Bytes a, Bytes b) {
    for (int i = 0; i < 16; ++i) a.at[i] = static_cast<uint8_t>(a.at[i] ^ b.at[i]);
    return a;
  }
  static Bytes max(Bytes a, Bytes b) {
    for (int i = 0; i < 16; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
  }

  static void interleave(const Bytes* row, Column* out) {
    for (int i = 0; i < 64; ++i) out[i / 16].at[i % 16] = row[i % 4].at[i / 4];
  }
  static void interleave_weights(const Bytes* row, Column* out) {
    for (int i = 0; i < 64; ++i) out[i / 16].at[i % 16] = static_cast<int8_t>(row[i % 4].at[i / 4]);
  }

  static Sums zero() { return {}; }
  static Sums load_sums(const int32_t* p) {
    Sums y;
    std::memcpy(y.at, p, 16);
    return y;
  }
  static void store_sums(int32_t* p, Sums x) { std::memcpy(p, x.at, 16); }
  static Sums negative(Sums x) {
    for (int32_t& s : x.at) s = -s;
    return x;
  }
  static Sums dot(Sums sums, const Column& a, const Column& b) {
    for (int i = 0; i < 16; ++i) sums.at[i / 4] += a.at[i] * b.at[i];
    return sums;
  }

  static Floats set1_float(float x) { return {{x, x, x, x}}; }
  static Floats load_floats(const float* p) {
    Floats y;
    std::memcpy(y.at, p, 16);
    return y;
  }
  static Floats to_floats(Sums x) {
    Floats y;
    for (int i = 0; i < 4; ++i) y.at[i] = static_cast<float>(x.at[i]);
    return y;
  }
  static Floats multiply(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static Floats add_floats(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Floats min_floats(Floats a, Floats b) {
    for (int i = 0; i < 4; ++i) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
    return a;
  }
  // What is below the words' range may become any number below it.
  static Ints round(Floats x) {
    Sums y;
    for (int i = 0; i < 4; ++i) {
      const float bounded = x.at[i] > -40000.0f ? x.at[i] : -40000.0f;
      y.at[i] = static_cast<int32_t>(Scalar<float>::round(bounded));
    }
    return y;
  }

  static Words set1_word(int32_t x) { return {{x, x, x, x, x, x, x, x}}; }
  static Words words(Ints a, Ints b) {
    Words y;
    std::memcpy(y.at, a.at, 16);
    std::memcpy(y.at + 4, b.at, 16);
    return y;
  }
  static Words add(Words a, Words b) {
    for (int i = 0; i < 8; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Bytes bytes(Words a, Words b) {
    Bytes y;
    for (int i = 0; i < 16; ++i) {
      const int32_t x = i < 8 ? a.at[i] : b.at[i - 8];
      y.at[i] = static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
    }
    return y;
  }
};

}  // namespace
}  // namespace fastquant
