// Layers that quantize their floating-point input at each call, with a scale and a zero point of its range.
#pragma once

#include <memory>

#include "../../memory.h"
#include "convolution.h"
#include "quantization.h"

namespace fastquant {

// The scale and zero point that torch.ao's dynamic layers choose for a range: those of uint8, which leave the
// upper half of it unused with reduce_range.
Quantization dynamic_qparams(float low, float high, bool reduce_range);

// Elements of a floating-point tensor (fp32, fp16 or bf16), and their values as uint8. NaN and infinities have
// no part in the range: what belongs to the samples that hold one is made NaN by `spread_nonfinite`.
class DynamicInput {
 public:
  // n elements as they lie.
  DynamicInput(const void* x, Element type, int64_t n, bool reduce_range);
  // x is [images, channels, pixels], the values are [images, pixels, channels].
  DynamicInput(const void* x, Element type, int64_t images, int64_t channels, int64_t pixels,
               bool reduce_range);

  QuantizedValues values() const { return {bytes_.get(), qparams_.scale, qparams_.zero_point, false}; }

  // Cuts the elements into `samples`, and looks at those from `first` on that have a part in y, `outputs`
  // elements for each of `count`. Where one has NaN or infinities, what y has of it becomes NaN.
  void spread_nonfinite(int64_t samples, int64_t first, int64_t count, void* y, OutputType type,
                        int64_t outputs) const;

  // A linear layer's output for `count` of `rows` rows, from `first` on: y is [count, out_features].
  void linear(int64_t rows, int64_t first, int64_t count, int64_t out_features, const uint8_t* packed,
              const LayerScales& scales, bool relu, void* y, OutputType output) const;

 private:
  const void* x_;
  Element type_;
  int64_t n_;
  bool has_nonfinite_;
  Quantization qparams_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// The output of a layer, as floating-point numbers.
OutputFormat floating_output(void* y, OutputType type, bool relu);

// x: [rows, in_features], contiguous, as is y, [rows, out_features].
void dynamic_linear(const void* x, Element type, int64_t rows, int64_t in_features, int64_t out_features,
                    const uint8_t* packed, const LayerScales& scales, bool relu, bool reduce_range, void* y,
                    OutputType output);

}  // namespace fastquant
