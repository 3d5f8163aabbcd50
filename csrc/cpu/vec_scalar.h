// Vectors of one element, with the interface of ../math/vector.h. The portable kernel table consists of them,
// and other tables use them for the elements that are left over by whole vectors.
#pragma once

#include "../math/numbers.h"

namespace fastquant {
namespace {

template <class T>
struct Scalar {
  static constexpr int N = 1;
  using Element = T;
  using Reg = T;
  using Mask = bool;
  static constexpr bool kAlternates = false;

  static Reg set1(T x) { return x; }
  template <class Stored>
  static Reg load(const Stored* p) {
    return static_cast<T>(to_compute(*p));
  }
  template <class Stored>
  static void load_pair(const Stored* p, Reg* a, Reg* b) {
    *a = load(p);
    *b = load(p + 1);
  }
  template <class Stored>
  static void store(Stored* p, Reg x) {
    from_compute(p, x);
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
  template <class Stored>
  static Reg rounded_to(const Stored*, Reg x) {
    Stored rounded;
    store(&rounded, x);
    return load(&rounded);
  }
  static constexpr bool kStoresOthers = false;
  static void store_index(int32_t* p, Reg x) { *p = static_cast<int32_t>(x); }

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg even(Reg a, Reg) { return a; }
  static Reg odd(Reg, Reg b) { return b; }
  static Reg zip_low(Reg a, Reg) { return a; }
  static Reg zip_high(Reg, Reg b) { return b; }
  static T lowest(Reg x) { return x; }
  static T highest(Reg x) { return x; }
  static float nmadd(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(c) - static_cast<double>(a) * static_cast<double>(b));
  }
  static Reg third(Reg x) { return x / 3; }
  static float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }

  // From 2^23 on (2^52 in double), every number is an integer. So adding and then subtracting it rounds to
  // the nearest integer, ties to even. nearbyint would be a library call on the baseline processor.
  static float round(float x) {
    const float magnitude = __builtin_fabsf(x);
    return magnitude < 0x1p23f ? __builtin_copysignf((magnitude + 0x1p23f) - 0x1p23f, x) : x;
  }
  static double round(double x) {
    const double magnitude = __builtin_fabs(x);
    return magnitude < 0x1p52 ? __builtin_copysign((magnitude + 0x1p52) - 0x1p52, x) : x;
  }
  static Reg floor(Reg x) {
    const Reg nearest = round(x);
    return nearest > x ? nearest - 1 : nearest;
  }

  static Mask lt(Reg a, Reg b) { return a < b; }
  static Mask le(Reg a, Reg b) { return a <= b; }
  static Mask not_lt(Reg a, Reg b) { return !(a < b); }
  static Mask not_le(Reg a, Reg b) { return !(a <= b); }
  static Mask unordered(Reg a, Reg b) { return a != a || b != b; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static Mask either(Mask a, Mask b) { return a || b; }
  static Mask none() { return false; }
  static bool any(Mask m) { return m; }
  static uint32_t bits(Mask m) { return m; }
  static Mask from_bits(uint32_t bits) { return (bits & 1u) != 0; }
  static Reg select(Mask m, Reg yes, Reg no) { return m ? yes : no; }
};

}  // namespace
}  // namespace fastquant
