// What the integers of a tensor stand for, and how kernels read them: as unsigned bytes, those of int8 with the
// sign bit flipped and a zero point that is larger by 128.
#pragma once

#include <cstdint>

#include "../../memory.h"

namespace fastquant {

// real = (q - zero_point) * scale
struct Quantization {
  double scale;
  int64_t zero_point;
  bool is_signed;  // int8
};

inline uint8_t flip_of(bool is_signed) { return is_signed ? 0x80 : 0; }

inline int zero_point_of_bytes(int64_t zero_point, bool is_signed) {
  const int64_t of_bytes = zero_point + (is_signed ? 128 : 0);
  check(of_bytes >= 0 && of_bytes <= 255, "zero_point ", zero_point, " is not a value of the dtype");
  return static_cast<int>(of_bytes);
}

}  // namespace fastquant
