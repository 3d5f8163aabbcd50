// Compares convolutions and linear layers on quantized tensors, for every instruction set, with simple loops.
// Independent of torch, so that it can run under sanitizers and emulators of other processors.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <thread>

#include "cpu/quantized/convolution.h"
#include "cpu/quantized/packing.h"
#include "cpu/quantized/shared_parts.h"
#include "cpu/quantized/transposed.h"
#include "math/numbers.h"
#include "quantized_testing.h"

namespace fastquant {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Layer {
  ConvShape shape;
  bool transposed, x_is_signed;
  int64_t x_zero_point;
  double x_scale;
  Buffer<uint8_t> x, packed;
  Buffer<int8_t> weight;
  Buffer<float> weight_scale, bias;
  bool has_bias;
  OutputFormat format;

  // x has in_channels of a group, the output out_channels.
  int64_t in_channels() const { return shape.in_channels / shape.groups; }
  int64_t out_channels() const { return shape.out_channels / shape.groups; }
  int64_t taps() const { return shape.kernel[0] * shape.kernel[1] * shape.kernel[2]; }
};

ConvShape random_shape(bool transposed, bool depthwise) {
  ConvShape s;
  const int64_t dims = pick({1, 2, 2, 3});
  s.batch = pick({1, 1, 2});
  s.groups = depthwise ? pick({2, 8, 16, 17, 40, 64, 72, 80, 130}) : pick({1, 1, 1, 2, 3});
  s.in_channels = s.groups * (depthwise ? 1 : pick({1, 3, 4, 8, 16, 17, 36}));
  s.out_channels = s.groups * (depthwise ? pick({1, 1, 1, 2, 3}) : pick({1, 4, 16, 31, 64, 70, 129}));
  if (!depthwise && rng() % 4 == 0) {  // groups that are multiplied together
    const int64_t channels = pick({4, 8, 16});
    s.groups = pick({1, 2, 3, 5, 8}) * (16 / channels);
    s.in_channels = s.out_channels = s.groups * channels;
  }
  const int64_t kernel = pick({1, 2, 3, 3, 5}), stride = pick({1, 1, 2, 3}), dilation = pick({1, 1, 2});
  const bool squares = depthwise && dims == 2 && rng() % 2 == 0;  // what stride 2 has a kernel of its own for
  for (int d = 0; d < ConvShape::kDims; ++d) {
    const bool there = d >= ConvShape::kDims - dims;
    s.kernel[d] = there ? (rng() % 4 == 0 ? pick({1, 2, 3, 5}) : kernel) : 1;
    s.stride[d] = there ? (rng() % 4 == 0 ? pick({1, 2, 3}) : stride) : 1;
    s.dilation[d] = there ? dilation : 1;
    if (there && squares) s.kernel[d] = kernel <= 3 ? 3 : 5, s.stride[d] = 2, s.dilation[d] = 1;
    const int64_t reach = s.dilation[d] * (s.kernel[d] - 1);
    s.padding[d] = there ? between(0, reach) : 0;
    s.in[d] = there ? between(1, dims == 3 ? 5 : 11) : 1;
    if (there && d == ConvShape::kDims - 1 && rng() % 8 == 0) s.in[d] += 40;
    // Whole tiles of outputs that meet nothing but padding.
    if (there && d == ConvShape::kDims - 1 && rng() % 8 == 0) s.padding[d] = reach + between(1, 40);
    if (transposed) {
      const int64_t more = there ? between(0, std::max(s.stride[d], s.dilation[d]) - 1) : 0;
      const auto out = [&] { return (s.in[d] - 1) * s.stride[d] - 2 * s.padding[d] + reach + more + 1; };
      while (out() < 1) ++s.in[d];
      s.out[d] = out();
    } else {
      s.in[d] = std::max(s.in[d], reach + 1 - 2 * s.padding[d]);
      s.out[d] = (s.in[d] + 2 * s.padding[d] - reach - 1) / s.stride[d] + 1;
    }
  }
  return s;
}

Layer random_layer(bool transposed, bool depthwise) {
  const ConvShape s = random_shape(transposed, depthwise);
  const bool is_signed = rng() % 2 == 0;
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], per_channel = pick({0, 1});
  const int64_t first = transposed ? s.in_channels : s.out_channels;
  const int64_t second = (transposed ? s.out_channels : s.in_channels) / s.groups;
  const int64_t shape[] = {first, second, s.kernel[0], s.kernel[1], s.kernel[2]};
  const PackedLayout layout(shape, 5, s.groups, transposed);
  Layer layer = {s,
                 transposed,
                 is_signed,
                 random_zero_point(is_signed),
                 0.02,
                 random_bytes(s.batch * s.in[0] * s.in[1] * s.in[2] * s.in_channels),
                 Buffer<uint8_t>(layout.bytes()),
                 random_bytes<int8_t>(first * second * taps),
                 Buffer<float>(per_channel != 0 ? s.out_channels : 1),
                 Buffer<float>(s.out_channels),
                 rng() % 4 != 0,
                 {}};
  pack_weight(layer.weight.data(), layout, layer.packed.data());
  Buffer<int8_t> unpacked(layer.weight.size());
  unpack_weight(layer.packed.data(), layout, unpacked.data());
  expect(unpacked == layer.weight, "a weight, packed and unpacked");
  for (int64_t i = 0; i < layer.weight_scale.size(); ++i)
    layer.weight_scale[i] = 0.001f * float(between(1, 20));
  for (int64_t i = 0; i < s.out_channels; ++i) layer.bias[i] = 0.01f * float(between(-300, 300));
  const OutputType type = OutputType(pick({0, 0, 0, 1, 1, 2, 3}));
  const bool floating = bytes_of(type) > 1;
  layer.format = {nullptr,
                  type,
                  0.01 * std::sqrt(double(taps * layer.in_channels())) * double(between(1, 4)),
                  floating ? 0 : random_zero_point(type == OutputType::s8),
                  pick({0, 1}) != 0 ? 0.0 : -kInf,
                  pick({0, 1}) != 0 ? 6.0 : kInf};
  return layer;
}

// The exact sum of an output, by the definition of the layer. at: position of the output.
int32_t exact_sum(const Layer& layer, int64_t n, const int64_t (&at)[3], int64_t channel) {
  const ConvShape& s = layer.shape;
  const int64_t group = channel / layer.out_channels();
  int64_t sum = 0;
  for (int64_t tap = 0; tap < layer.taps(); ++tap) {
    const int64_t k[3] = {tap / s.kernel[2] / s.kernel[1], tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
    int64_t position = n;
    bool inside = true;
    for (int d = 0; d < 3; ++d) {
      int64_t i = layer.transposed ? at[d] + s.padding[d] - k[d] * s.dilation[d]
                                   : at[d] * s.stride[d] - s.padding[d] + k[d] * s.dilation[d];
      if (layer.transposed) {
        inside = inside && i % s.stride[d] == 0;
        i /= s.stride[d];
      }
      inside = inside && i >= 0 && i < s.in[d];
      position = position * s.in[d] + i;
    }
    if (!inside) continue;
    for (int64_t c = 0; c < layer.in_channels(); ++c) {
      const int64_t in = group * layer.in_channels() + c;
      const int64_t w = layer.transposed ? in * layer.out_channels() + channel % layer.out_channels()
                                         : channel * layer.in_channels() + c;
      const int64_t x = value_of(layer.x[position * s.in_channels + in], layer.x_is_signed);
      sum += (x - layer.x_zero_point) * layer.weight[w * layer.taps() + tap];
    }
  }
  return int32_t(sum);
}

void check_layer(Layer& layer) {
  const ConvShape& s = layer.shape;
  OutputFormat& format = layer.format;
  const bool floating = bytes_of(format.type) > 1;
  const double unit = floating ? 1 : format.scale;
  Buffer<uint8_t> out(s.positions() * s.out_channels * bytes_of(format.type));
  format.data = out.data();
  // Outputs of floating-point types have to be aligned.
  std::vector<float> aligned(floating ? size_t(s.positions() * s.out_channels) : 0);
  if (floating) format.data = aligned.data();
  const LayerScales scales = {layer.weight_scale.data(), layer.weight_scale.size() > 1 || s.out_channels == 1,
                              layer.has_bias ? layer.bias.data() : nullptr};
  const QuantizedValues x = {layer.x.data(), layer.x_scale, layer.x_zero_point, layer.x_is_signed};
  (layer.transposed ? quantized_conv_transpose : quantized_conv)(x, s, layer.packed.data(), scales, format);
  bool same = true;
  int64_t i = 0;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t p = 0; p < s.out[0] * s.out[1] * s.out[2]; ++p) {
      const int64_t at[3] = {p / s.out[2] / s.out[1], p / s.out[2] % s.out[1], p % s.out[2]};
      for (int64_t c = 0; c < s.out_channels; ++c, ++i) {
        const int64_t of_scale = layer.weight_scale.size() > 1 ? c : 0;
        const float factor = float(double(layer.weight_scale[of_scale]) * (layer.x_scale / unit));
        const float bias = layer.has_bias ? float(double(layer.bias[c]) * (1.0 / unit)) : 0.0f;
        const float product = float(exact_sum(layer, n, at, c)) * factor;
        const float y = product + bias;
        const float bounded = std::min(std::max(y, float(format.low)), float(format.high));
        if (format.type == OutputType::f32) {
          same = same && aligned[size_t(i)] == bounded;
        } else if (format.type == OutputType::bf16) {
          BFloat16 rounded;
          from_compute(&rounded, bounded);
          same = same && std::memcmp(reinterpret_cast<const char*>(aligned.data()) + i * 2, &rounded, 2) == 0;
        } else {
          same = same && out[i] == level(y, format.scale, format.zero_point, format.low, format.high,
                                         format.type == OutputType::s8);
        }
      }
    }
  }
  expect(same, layer.transposed                           ? "transposed convolution"
               : s.groups > 1 && layer.in_channels() == 1 ? "depthwise convolution"
                                                          : "convolution");
}

void check_linear(int64_t rows, int64_t in, int64_t out) {
  Layer layer = {{rows, in, out, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
                 false,
                 rng() % 2 == 0,
                 3,
                 0.02,
                 random_bytes(rows * in),
                 Buffer<uint8_t>(0),
                 random_bytes<int8_t>(out * in),
                 Buffer<float>(1),
                 Buffer<float>(out),
                 true,
                 {nullptr, OutputType::u8, 0.5, 7, -kInf, kInf}};
  const int64_t shape[] = {out, in};
  const PackedLayout layout(shape, 2, 1, false);
  layer.packed = Buffer<uint8_t>(layout.bytes());
  pack_weight(layer.weight.data(), layout, layer.packed.data());
  layer.weight_scale[0] = 0.01f;
  check_layer(layer);
  Buffer<uint8_t> by_conv(rows * out), by_linear(rows * out);
  const QuantizedValues x = {layer.x.data(), layer.x_scale, layer.x_zero_point, layer.x_is_signed};
  const LayerScales scales = {layer.weight_scale.data(), out == 1, layer.bias.data()};
  layer.format.data = by_conv.data();
  quantized_conv(x, layer.shape, layer.packed.data(), scales, layer.format);
  layer.format.data = by_linear.data();
  quantized_linear(x, rows, in, out, layer.packed.data(), scales, layer.format);
  expect(by_conv == by_linear, "linear");
}

// Layers so large that parts of a thread may be done by others: split by rows, and by channels.
void check_large_layers() {
  for (const int uneven : {0, 16}) {
    uneven_loops = uneven;
    check_linear(700, 128, 200);
    uneven_loops = uneven;
    check_linear(100, 512, 512);
  }
}

// Every unit is done once; and after a loop in which one thread was much slower, others take over what it has
// left.
void check_shared_parts() {
  constexpr int64_t kUnits = 25, kThreads = 3, kOfFirst = kUnits / kThreads;
  uneven_loops = 0;
  bool helped = false;
  for (int loop = 0; loop < 20 && !helped; ++loop) {
    std::atomic<int64_t> done[kUnits] = {}, others{0};
    const bool fine = uneven_loops > 0;
    for_shared_parts(kUnits, kThreads, 4, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        // This thread is slow: it waits for all others, or, where they may take over, until they do.
        const auto start = std::chrono::steady_clock::now();
        while (others < (fine ? kUnits - kOfFirst + 1 : kUnits - end) &&
               std::chrono::steady_clock::now() - start < std::chrono::seconds(5))
          std::this_thread::yield();
        helped = others > kUnits - kOfFirst;
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
      } else {
        others += end - begin;
      }
      for (int64_t i = begin; i < end; ++i) ++done[i];
    });
    for (const auto& times : done) expect(times == 1, "units that threads share");
  }
  expect(helped, "a slow thread's units, taken by others");
  uneven_loops = 0;
}

int run(int rounds) {
  check_shared_parts();
  return run_everywhere([&] {
    check_large_layers();
    for (int round = 0; round < rounds; ++round) {
      for (bool depthwise : {false, true}) {
        for (bool transposed : {false, true}) {
          Layer layer = random_layer(transposed, depthwise);
          check_layer(layer);
        }
      }
      check_linear(between(1, 30), between(1, 130), pick({1, 8, 16, 40, 64, 100, 200}));
    }
  });
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 12); }
