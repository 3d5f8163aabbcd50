// The error of a tensor that was quantized, beside the floating one.
#pragma once

#include <optional>

#include "../memory.h"
#include "quantized/quantization.h"

namespace fastquant {

// The numbers in `sums` of the op observe_error_.
enum ErrorSum { kPairs, kSignal, kNoise, kShared, kClipped, kErrorSums };

// What x is rounded to before it is compared.
struct RoundedTo {
  float scale;
  int64_t zero_point, quant_min, quant_max;

  int64_t levels() const { return quant_max - quant_min + 1; }
};

// Adds the errors of n elements to the sums. Pairs in which an element is not finite are left out; the first
// entry counts the others. `integers` is null, or has an entry for each level of the grid: the entries of the
// levels that the reference takes become 1, and its elements beyond the grid are counted as clipped.
// The sums depend neither on the number of threads nor on the instruction set.
void observe_error(const float* reference, const float* x, int64_t n, const std::optional<RoundedTo>& grid,
                   double* sums, uint8_t* integers);

// The same of bytes that stand for real numbers.
void observe_error(const float* reference, const uint8_t* x, int64_t n, const Quantization& q, double* sums);

}  // namespace fastquant
