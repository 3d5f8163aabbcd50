// Pooling of quantized tensors, on plain memory and in parallel.
#pragma once

#include <optional>
#include <vector>

#include "images.h"

namespace fastquant {

// Windows along one dimension: of each output, the pixels [begin, end) of the input, every `step`th.
struct Windows {
  // For so many outputs.
  void reserve(int64_t outputs) {
    for (auto* each : {&begin, &end, &divisor}) each->reserve(static_cast<size_t>(outputs));
  }

  std::vector<int64_t> begin, end, divisor;
  int64_t step;
};

// Those of a kernel that slides over `size` pixels. divisor counts the pixels of a window, those in the padding
// included if count_padding.
Windows sliding_windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                        bool ceil_mode, bool count_padding);
// Those that divide `size` pixels into `outputs` parts.
Windows adaptive_windows(int64_t size, int64_t outputs);

// The output lies in memory as [images, depth, height, width, channels].
void max_pool(const Images& x, const Windows (&windows)[kPoolDims], uint8_t* out);
// `divisor` is that of every window, if there is one.
void average_pool(const Images& x, int64_t zero_point, const Windows (&windows)[kPoolDims],
                  std::optional<int64_t> divisor, uint8_t* out);
// The mean of each of some rows of n contiguous elements.
void mean_of_rows(const uint8_t* x, int64_t rows, int64_t n, bool is_signed, uint8_t* out);

}  // namespace fastquant
