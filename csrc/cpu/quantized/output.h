// What turns the exact sums of a layer's products into its output: a factor and a bias for each channel, then
// either bounds, rounding and a zero point, or floating-point results.
#pragma once

#include <cstdint>
#include <memory>

namespace fastquant {

enum class OutputType : int32_t { u8, s8, f32, bf16 };

static inline int64_t bytes_of(OutputType type) {
  return type == OutputType::f32 ? 4 : type == OutputType::bf16 ? 2 : 1;
}

// y = float(sum) * factor + bias, both operations rounded. An integer output is then
// round(clamp(y, low, high)) + zero_point, with whole low and high, so that the result is in 0 ... 255; for
// int8 that is the output plus 128. A floating-point output is clamp(y, low, high).
struct OutputStage {
  const int32_t* offset;  // of each channel: where its sum starts
  const float* factor;
  const float* bias;
  float low, high;
  int32_t zero_point;
  OutputType type;
  uint8_t flip;    // what a byte is combined with by exclusive or: 0x80 for int8
  void* data;      // of the first channel in the first row
  int64_t stride;  // elements from row to row
};

// The values of a tensor and how they are to be read.
struct QuantizedValues {
  const uint8_t* data;
  double scale;
  int64_t zero_point;
  bool is_signed;  // int8
};

// What a layer's output shall be. scale and zero_point mean nothing for floating-point types.
struct OutputFormat {
  void* data;
  OutputType type;
  double scale;
  int64_t zero_point;
  double low, high;  // in real units
};

// Factors of a layer: weight_scale has one entry, or one for each channel; bias may be null.
struct LayerScales {
  const float* weight_scale;
  bool per_channel;
  const float* bias;
};

// An OutputStage and the arrays that it points to. Channel c of group g is at g * group_stride + c, and there
// are entries for all group_stride channels.
class Requantization {
 public:
  // weight_sums: int32, the sum of each channel's weights, at the same places, at any address; null if the
  // offsets are not needed. x_zero_point: what the kernel's values of x have as their zero point.
  Requantization(int64_t groups, int64_t channels, int64_t group_stride, const void* weight_sums,
                 double x_scale, int64_t x_zero_point, const LayerScales& scales, const OutputFormat& format);

  const OutputStage& stage() const { return stage_; }
  // The same for a group of channels, from row `row` on.
  OutputStage at(int64_t group, int64_t row) const;

 private:
  OutputStage stage_;
  int64_t channels_, group_stride_;
  std::unique_ptr<int32_t[]> arrays_;
};

}  // namespace fastquant
