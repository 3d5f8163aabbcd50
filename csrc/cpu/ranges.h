// From the statistics of a histogram to the range that its values are quantized to.
#pragma once

#include "../math/qparams.h"
#include "arrays.h"

namespace fastquant {

enum class RangeMethod : int64_t { minmax = 0, l2 = 1, mse = 2, percentile = 3, entropy = 4 };

struct RangeSettings {
  RangeMethod method;
  double percentile;
  int64_t search_levels;  // of l2
  QParamsConfig grid;
};

// Finds the range within [min_val, max_val] that the search of torch.ao's HistogramObserver finds.
void search_histogram_range(const Array& histogram, const Array& min_val, const Array& max_val, int64_t levels,
                            const Array& new_min, const Array& new_max);

// The range of each channel by one of the methods, extended to hold 0. `histogram` has as many rows of bins as
// min_val has elements. docs/calibration.md defines the methods.
void histogram_range(const Array& histogram, const Array& min_val, const Array& max_val,
                     const RangeSettings& settings, const Array& new_min, const Array& new_max);

// The range of each channel of x whose quantization has the least squared error, of all on the grid of the
// method mse; inf and -inf for a channel without finite elements.
void least_error_range(const Dense& x, const QParamsConfig& grid, const Array& new_min, const Array& new_max);

// The mean squared error of quantizing the values of each channel, in fp64.
void histogram_error(const Array& histogram, const Array& min_val, const Array& max_val, const Array& scale,
                     const Array& zero_point, int64_t quant_min, int64_t quant_max, const Array& error);

}  // namespace fastquant
