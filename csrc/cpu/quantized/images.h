// Images of bytes in memory.
#pragma once

#include <cstdint>

#include "../../memory.h"

namespace fastquant {

constexpr int kPoolDims = 3;  // depth, height, width

// Images whose channels lie next to each other.
struct Images {
  const uint8_t* data;
  int64_t count, channels;
  int64_t image_stride, strides[kPoolDims];
  bool is_signed;  // int8
};

}  // namespace fastquant
