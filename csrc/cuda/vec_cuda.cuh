// The vector interface of ../math/vector.h for one element per GPU thread, for code that CPU and GPU share.
#pragma once

#include "../math/vector.h"

namespace fastquant {
namespace {

template <class T>
struct Cuda {
  static constexpr int N = 1;
  using Element = T;
  using Reg = T;
  using Mask = bool;

  FASTQUANT_HD static Reg set1(T x) { return x; }

  FASTQUANT_HD static Reg add(Reg a, Reg b) { return a + b; }
  FASTQUANT_HD static Reg sub(Reg a, Reg b) { return a - b; }
  FASTQUANT_HD static Reg mul(Reg a, Reg b) { return a * b; }
  FASTQUANT_HD static Reg div(Reg a, Reg b) { return a / b; }
  FASTQUANT_HD static Reg third(Reg x) { return x / 3; }
  FASTQUANT_HD static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  FASTQUANT_HD static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  FASTQUANT_HD static float nmadd(float a, float b, float c) { return fmaf(-a, b, c); }
  FASTQUANT_HD static float madd(float a, float b, float c) { return fmaf(a, b, c); }
  FASTQUANT_HD static double madd(double a, double b, double c) { return fma(a, b, c); }
  FASTQUANT_HD static float round(float x) { return rintf(x); }
  FASTQUANT_HD static double round(double x) { return rint(x); }
  FASTQUANT_HD static float floor(float x) { return floorf(x); }
  template <class Stored>
  FASTQUANT_HD static Reg rounded_to(const Stored*, Reg x) {
    Stored rounded;
    from_compute(&rounded, x);
    return to_compute(rounded);
  }

  FASTQUANT_HD static Mask lt(Reg a, Reg b) { return a < b; }
  FASTQUANT_HD static Mask le(Reg a, Reg b) { return a <= b; }
  FASTQUANT_HD static Mask not_lt(Reg a, Reg b) { return !(a < b); }
  FASTQUANT_HD static Mask not_le(Reg a, Reg b) { return !(a <= b); }
  FASTQUANT_HD static Mask both(Mask a, Mask b) { return a && b; }
  FASTQUANT_HD static Reg select(Mask m, Reg yes, Reg no) { return m ? yes : no; }
};

static_assert(has_arithmetic<Cuda<float>>() && has_arithmetic<Cuda<double>>(), "see math/vector.h");

}  // namespace
}  // namespace fastquant
