// The table of pooling kernels. Channels are contiguous in memory.
#pragma once

#include <cstdint>

namespace fastquant {

// A row of outputs, each of which pools a window of the input.
struct PoolRow {
  const uint8_t* const* rows;  // the rows of input that the windows cover
  int64_t row_count;
  const int64_t* begin;  // the window of output i has the pixels begin[i], begin[i] + step, … before end[i]
  const int64_t* end;
  int64_t step;
  int64_t pixel_stride;  // of the input, in bytes
  int64_t channels;
  uint8_t* out;  // the outputs follow each other
  int64_t count;
  uint8_t flip;  // 0x80 for int8, else 0
};

// A row of outputs, each a weighted sum of pixels at the same places of some rows of the input.
struct InterpolatedRow {
  const uint8_t* const* rows;
  const float* row_weights;
  int64_t row_count;
  const int64_t* left;  // of output i, the pixels left[i] and right[i], and their weights
  const int64_t* right;
  const float* left_weights;
  const float* right_weights;
  int64_t pixel_stride;
  int64_t channels;
  uint8_t* out;
  int64_t count;
  uint8_t flip;
};

struct PoolingKernels {
  // The largest element of each window; the least there is where a window is empty.
  void (*max)(const PoolRow& row);

  // The sum of (x - zero_point) in each window, divided by rows_divisor * divisor[i] and rounded, plus the zero
  // point. The zero point is that of unsigned bytes. A window has at most kMostOfWindow pixels.
  void (*average)(const PoolRow& row, int zero_point, int64_t rows_divisor, const int64_t* divisor);

  // The sum over the rows of (left * its weight + right * its weight) * the row's weight, each operation
  // rounded; then rounded to an integer.
  void (*interpolate)(const InterpolatedRow& row);

  // The mean of each of some rows of n contiguous elements, rounded.
  void (*mean_of_rows)(const uint8_t* x, uint8_t* out, int64_t rows, int64_t n, uint8_t flip);
};

// So that sums of bytes fit in int32.
constexpr int64_t kMostOfWindow = int64_t{1} << 23;

extern const PoolingKernels kPoolingScalar;
extern const PoolingKernels kPoolingAvx2;
extern const PoolingKernels kPoolingAvx512;
extern const PoolingKernels kPoolingNeon;

}  // namespace fastquant
