#include "output.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastquant {
namespace {

// The integer that bounds an output, relative to its zero point.
double level(double bound, const OutputFormat& format, double least, double greatest) {
  const double zero_point = static_cast<double>(format.zero_point);
  const double wanted = std::nearbyint(bound / format.scale);  // infinite where there is no bound
  return std::min(std::max(wanted, least - zero_point), greatest - zero_point);
}

}  // namespace

Requantization::Requantization(int64_t groups, int64_t channels, int64_t group_stride, const void* weight_sums,
                               double x_scale, int64_t x_zero_point, const LayerScales& scales,
                               const OutputFormat& format)
    : channels_(channels),
      group_stride_(group_stride),
      // Every entry that a channel has is written below, the others are only read.
      arrays_(new int32_t[3 * groups * group_stride]) {
  const int64_t count = groups * group_stride;
  int32_t* const offset = arrays_.get();
  float* const factor = reinterpret_cast<float*>(offset + count);
  float* const bias = factor + count;
  const bool floating = format.type == OutputType::f32 || format.type == OutputType::bf16;
  const double unit = floating ? 1.0 : format.scale, scale = x_scale / unit, inverse = 1.0 / unit;
  const uint32_t zero_point = static_cast<uint32_t>(x_zero_point);
  if (weight_sums == nullptr) std::fill_n(offset, count, 0);
  for (int64_t i = 0; weight_sums != nullptr && i < count; ++i) {
    uint32_t sum;
    std::memcpy(&sum, static_cast<const char*>(weight_sums) + i * sizeof sum, sizeof sum);
    offset[i] = static_cast<int32_t>(-(zero_point * sum));
  }
  for (int64_t g = 0; g < groups; ++g) {
    float* const f = factor + g * group_stride;
    float* const b = bias + g * group_stride;
    if (scales.per_channel) {
      const float* const s = scales.weight_scale + g * channels;
      for (int64_t c = 0; c < channels; ++c) {
        f[c] = static_cast<float>(static_cast<double>(s[c]) * scale);
      }
    } else {
      std::fill_n(f, channels, static_cast<float>(static_cast<double>(*scales.weight_scale) * scale));
    }
    if (scales.bias != nullptr) {
      const float* const from = scales.bias + g * channels;
      for (int64_t c = 0; c < channels; ++c) b[c] = static_cast<float>(static_cast<double>(from[c]) * inverse);
    } else {
      std::fill_n(b, channels, 0.0f);
    }
    std::fill(f + channels, f + group_stride, 0.0f);
    std::fill(b + channels, b + group_stride, 0.0f);
  }
  stage_.offset = offset;
  stage_.factor = factor;
  stage_.bias = bias;
  stage_.type = format.type;
  stage_.data = format.data;
  stage_.stride = groups * channels;
  stage_.flip = 0;
  stage_.zero_point = 0;
  stage_.low = static_cast<float>(format.low);
  stage_.high = static_cast<float>(format.high);
  if (!floating) {
    const bool is_signed = format.type == OutputType::s8;
    const double least = is_signed ? -128 : 0;
    stage_.low = static_cast<float>(level(format.low, format, least, least + 255));
    stage_.high = static_cast<float>(level(format.high, format, least, least + 255));
    stage_.zero_point = static_cast<int32_t>(format.zero_point) + (is_signed ? 128 : 0);
    stage_.flip = is_signed ? 0x80 : 0;
  }
}

OutputStage Requantization::at(int64_t group, int64_t row) const {
  OutputStage stage = stage_;
  stage.offset += group * group_stride_;
  stage.factor += group * group_stride_;
  stage.bias += group * group_stride_;
  stage.data = static_cast<char*>(stage.data) + (row * stage.stride + group * channels_) * bytes_of(stage.type);
  return stage;
}

}  // namespace fastquant
