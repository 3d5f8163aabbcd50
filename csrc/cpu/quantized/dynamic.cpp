#include "dynamic.h"

#include <cmath>
#include <limits>

#include "../extremes.h"
#include "elementwise.h"

namespace fastquant {
namespace {

// torch's smallest scale, so that a scale is no subnormal number in fp16.
constexpr float kLeastScale = 6.1e-5f;

// The zero point whose arithmetic has the smaller error: from the lower or from the upper end of the range.
int64_t zero_point_of(double low, double high, double scale, int64_t levels) {
  const double from_low = -low / scale, from_high = static_cast<double>(levels) - high / scale;
  const double error_of_low = -std::fabs(low / scale);
  const double error_of_high = static_cast<double>(levels) - std::fabs(high / scale);
  const double zero_point = error_of_low < error_of_high ? from_low : from_high;
  return static_cast<int64_t>(std::nearbyint(std::min(std::max(zero_point, 0.0), static_cast<double>(levels))));
}

// The range of the finite elements, and whether there are others.
bool range_of(const void* x, Element type, int64_t n, float* low, float* high) {
  return with_stored_type(type, [&](auto stored) {
    using S = decltype(stored);
    const auto* const values = static_cast<const S*>(x);
    const Dense d = {x, type, 1, 1, n};
    Extremes<Compute<S>> found(1);
    const bool nonfinite = n > 0 && extremes(values, d, &found);
    if (nonfinite) {
      found = Extremes<Compute<S>>(1);
      finite_extremes(values, d, &found);
    }
    *low = static_cast<float>(std::min<Compute<S>>(found.low[0], 0));
    *high = static_cast<float>(std::max<Compute<S>>(found.high[0], 0));
    return nonfinite;
  });
}

template <class S>
bool is_finite(const S* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(to_compute(x[i]))) return false;
  }
  return true;
}

}  // namespace

Quantization dynamic_qparams(float low, float high, bool reduce_range) {
  const int64_t levels = reduce_range ? 127 : 255;
  low = std::min(low, 0.0f);
  high = std::max(high, 0.0f);
  double scale = (static_cast<double>(high) - static_cast<double>(low)) / static_cast<double>(levels);
  const float rounded = static_cast<float>(scale);
  if (rounded == 0.0f || std::isinf(1.0f / rounded)) scale = 0.1;
  if (scale < static_cast<double>(kLeastScale)) {
    const float amplifier = kLeastScale / static_cast<float>(scale);
    scale = static_cast<double>(kLeastScale);
    const float reach = kLeastScale * static_cast<float>(levels);
    if (low == 0.0f) {
      high = reach;
    } else if (high == 0.0f) {
      low = -reach;
    } else {
      low *= amplifier;
      high *= amplifier;
    }
  }
  return {scale, zero_point_of(static_cast<double>(low), static_cast<double>(high), scale, levels), false};
}

DynamicInput::DynamicInput(const void* x, Element type, int64_t n, bool reduce_range)
    : x_(x), type_(type), n_(n), bytes_(new uint8_t[n]) {
  float low, high;
  has_nonfinite_ = range_of(x, type, n, &low, &high);
  qparams_ = dynamic_qparams(low, high, reduce_range);
  quantize(x, type, n, qparams_, bytes_.get());
}

DynamicInput::DynamicInput(const void* x, Element type, int64_t images, int64_t channels, int64_t pixels,
                           bool reduce_range)
    : x_(x), type_(type), n_(images * channels * pixels), bytes_(new uint8_t[n_]) {
  float low, high;
  has_nonfinite_ = range_of(x, type, n_, &low, &high);
  qparams_ = dynamic_qparams(low, high, reduce_range);
  quantize_transposed(x, type, images, channels, pixels, qparams_, bytes_.get());
}

void DynamicInput::spread_nonfinite(int64_t samples, int64_t first, int64_t count, void* y, OutputType type,
                                    int64_t outputs) const {
  if (!has_nonfinite_) return;
  const int64_t size = n_ / samples;
  with_stored_type(type_, [&](auto stored) {
    const auto* const x = static_cast<const decltype(stored)*>(x_) + first * size;
    for (int64_t s = 0; s < count; ++s) {
      if (is_finite(x + s * size, size)) continue;
      if (type == OutputType::f32) {
        std::fill_n(static_cast<float*>(y) + s * outputs, outputs, std::numeric_limits<float>::quiet_NaN());
      } else {
        std::fill_n(static_cast<uint16_t*>(y) + s * outputs, outputs, static_cast<uint16_t>(0x7fc0));
      }
    }
  });
}

void DynamicInput::linear(int64_t rows, int64_t first, int64_t count, int64_t out_features,
                          const uint8_t* packed, const LayerScales& scales, bool relu, void* y,
                          OutputType output) const {
  const int64_t in_features = n_ / rows;
  QuantizedValues x = values();
  x.data += first * in_features;
  quantized_linear(x, count, in_features, out_features, packed, scales, floating_output(y, output, relu));
  spread_nonfinite(rows, first, count, y, output, out_features);
}

OutputFormat floating_output(void* y, OutputType type, bool relu) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return {y, type, 1.0, 0, relu ? 0.0 : -kInfinity, kInfinity};
}

void dynamic_linear(const void* x, Element type, int64_t rows, int64_t in_features, int64_t out_features,
                    const uint8_t* packed, const LayerScales& scales, bool relu, bool reduce_range, void* y,
                    OutputType output) {
  if (rows == 0 || out_features == 0) return;
  const DynamicInput input(x, type, rows * in_features, reduce_range);
  input.linear(rows, 0, rows, out_features, packed, scales, relu, y, output);
}

}  // namespace fastquant
