// The element types tensors are stored in, and the type each is computed in. CPU and GPU kernels
// share this folder, and it is compiled once for each instruction set. Therefore everything in it is `static`
// or in an anonymous namespace, and nothing of std:: is used: the linker keeps one copy of an inline function
// that several files define, and that copy might hold instructions that the processor lacks.
#pragma once

#include <cstdint>

// Marks functions that GPU kernels call as well as CPU code.
#ifdef __CUDACC__
#define FASTQUANT_HD __host__ __device__
#else
#define FASTQUANT_HD
#endif

namespace fastquant {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class Stored>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// The type in which elements are computed: fp64 for fp64, fp32 for every narrower type.
template <class Stored>
using Compute = typename ComputeType<Stored>::type;

FASTQUANT_HD static inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

FASTQUANT_HD static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The largest finite number that a type holds.
FASTQUANT_HD static inline constexpr double largest_of(float) { return 0x1.fffffep127; }
FASTQUANT_HD static inline constexpr double largest_of(double) { return __DBL_MAX__; }
FASTQUANT_HD static inline constexpr double largest_of(Half) { return 0x1.ffcp15; }
FASTQUANT_HD static inline constexpr double largest_of(BFloat16) { return 0x1.fep127; }

FASTQUANT_HD static inline float to_compute(float x) { return x; }

FASTQUANT_HD static inline double to_compute(double x) { return x; }

FASTQUANT_HD static inline float to_compute(BFloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}

FASTQUANT_HD static inline float to_compute(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  // Zero or subnormal: a multiple of 2^-24.
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(value));
#endif
}

FASTQUANT_HD static inline void from_compute(float* to, float x) { *to = x; }

FASTQUANT_HD static inline void from_compute(double* to, double x) { *to = x; }

// Both narrowing conversions round to nearest, ties to even, and convert NaN to NaN.
FASTQUANT_HD static inline void from_compute(BFloat16* to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? static_cast<uint16_t>(0x7fc0u)
                 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

FASTQUANT_HD static inline void from_compute(Half* to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on the nearest half is infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 leaves the subnormal's bits, rounded by the adder, at the bottom.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  to->bits = static_cast<uint16_t>(sign | half);
#endif
}

namespace {

template <class T>
FASTQUANT_HD constexpr T infinity() {
  return static_cast<T>(__builtin_inf());
}

template <class T>
FASTQUANT_HD constexpr T largest() {
  return sizeof(T) == sizeof(float) ? static_cast<T>(0x1.fffffep127) : static_cast<T>(__DBL_MAX__);
}

// Clamps a finite value to [-most, most]; returns infinities and NaN unchanged.
template <class T>
FASTQUANT_HD T kept_finite(T value, double most) {
  if (value - value != 0 || !(static_cast<double>(value < 0 ? -value : value) > most)) return value;
  return static_cast<T>(value < 0 ? -most : most);
}

// Converts to an integer type: rounds towards zero and clamps to the type's range. NaN becomes 0.
template <class Integer, class T>
FASTQUANT_HD Integer saturated(T x) {
  constexpr int kBits = 8 * static_cast<int>(sizeof(Integer));
  constexpr Integer kLargest = static_cast<Integer>(~uint64_t{0} >> (65 - kBits));
  const T beyond = static_cast<T>(uint64_t{1} << (kBits - 1));
  if (x != x) return 0;
  if (x >= beyond) return kLargest;
  return x < -beyond ? -kLargest - 1 : static_cast<Integer>(x);
}

}  // namespace
}  // namespace fastquant
