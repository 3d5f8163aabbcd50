// The kernels for AMX, and the choice between them and those for AVX-512 VNNI, on products that are larger than
// those of quantized_layers_test.cpp. On processors without AMX, its instructions are emulated; without
// AVX-512 VNNI, nothing is tested.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "amx_emulation.h"
#include "cpu/quantized/convolution.h"
#include "cpu/quantized/even_rows.h"
#include "cpu/quantized/packing.h"
#include "cpu/quantized/transposed.h"
#include "quantized_testing.h"

namespace fastquant {
namespace {

constexpr const char* kAmx = "avx512_amx";

// What a layer's sums become.
struct Output {
  OutputType type = OutputType::f32;
  double scale = 1;
  int64_t zero_point = 0;
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
};

// A layer of unsigned bytes, whose outputs are its sums in fp32 unless another output is wanted.
struct Layer {
  Layer(const ConvShape& its_shape, bool is_transposed)
      : shape(its_shape),
        transposed(is_transposed),
        x(random_bytes(shape.batch * shape.in[0] * shape.in[1] * shape.in[2] * shape.in_channels)),
        packed(0),
        scale(shape.out_channels),
        bias(shape.out_channels) {
    for (int64_t c = 0; c < shape.out_channels; ++c) scale[c] = 1, bias[c] = 0;
    const int64_t first = transposed ? shape.in_channels : shape.out_channels;
    const int64_t second = (transposed ? shape.out_channels : shape.in_channels) / shape.groups;
    const int64_t sizes[] = {first, second, shape.kernel[0], shape.kernel[1], shape.kernel[2]};
    const PackedLayout layout(sizes, 5, shape.groups, transposed);
    packed = Buffer<uint8_t>(layout.bytes());
    const auto weight =
        random_bytes<int8_t>(first * second * shape.kernel[0] * shape.kernel[1] * shape.kernel[2]);
    pack_weight(weight.data(), layout, packed.data());
  }

  std::vector<uint8_t> output(const Output& as = Output()) const {
    std::vector<uint8_t> y(size_t(shape.positions() * shape.out_channels * bytes_of(as.type)));
    (transposed ? quantized_conv_transpose : quantized_conv)(
        {x.data(), 1, 3, false}, shape, packed.data(), {scale.data(), true, bias.data()},
        {y.data(), as.type, as.scale, as.zero_point, as.low, as.high});
    return y;
  }

  ConvShape shape;
  bool transposed;
  Buffer<uint8_t> x, packed;
  Buffer<float> scale, bias;
};

Layer linear(int64_t rows, int64_t in, int64_t out) {
  return {{rows, in, out, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, false};
}

Layer convolution(int64_t size, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t groups) {
  const int64_t y = (size + 2 * (kernel / 2) - kernel) / stride + 1;
  return {{1,
           in,
           out,
           groups,
           {1, size, size},
           {1, y, y},
           {1, kernel, kernel},
           {1, stride, stride},
           {0, kernel / 2, kernel / 2},
           {1, 1, 1}},
          false};
}

// With a kernel smaller than the stride, no tap meets some outputs.
Layer transposed(int64_t size, int64_t in, int64_t out, int64_t kernel) {
  const int64_t y = (size - 1) * 2 + 3;
  return {{1, in, out, 1, {1, size, size}, {1, y, y}, {1, kernel, kernel}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}},
          true};
}

// Of images of any size, whose rows are equally spaced, in copies with padding where there is some.
Layer convolution_of_images(int64_t in, int64_t out) {
  ConvShape s = {pick({1, 1, 2, 3}), in,        out,       1,         {1, 1, 1},
                 {1, 1, 1},          {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  for (int d = 1; d < ConvShape::kDims; ++d) {
    s.kernel[d] = pick({1, 2, 3, 5, 7});
    s.stride[d] = pick({1, 1, 2, 3});
    s.dilation[d] = d == 1 ? pick({1, 1, 2}) : 1;
    s.padding[d] = between(0, s.kernel[d]);
    const int64_t reach = (s.kernel[d] - 1) * s.dilation[d] + 1;
    s.in[d] = std::max(reach - 2 * s.padding[d], pick({1, between(2, 9), between(10, 36)}));
    s.out[d] = (s.in[d] + 2 * s.padding[d] - reach) / s.stride[d] + 1;
  }
  return {s, false};
}

Layer random_layer() {
  const int64_t in = pick({16, 17, 60, 64, 80, 96, 130, 256}), out = pick({16, 24, 48, 64, 100, 130});
  const int64_t size = between(3, 14);
  switch (rng() % 9) {
    case 0:
      return convolution(size, in, out, pick({1, 3}), pick({1, 2}), 1);
    case 1:
      return convolution(size, 2 * in, 2 * out, 3, 1, 2);
    case 2:
      return transposed(size, in, out, pick({1, 3}));
    case 3:
      // Rows of values that are equally spaced but for a few.
      return convolution(between(20, 44), pick({16, 64}), out, 1, 2, 1);
    case 4:
      return linear(between(8, 60), pick({700, 1024, 1500}), out);
    case 5:
      return convolution_of_images(pick({1, 3, 4, 12, 17, 32, 64}), out);
    case 6:
      return convolution_of_images(pick({24, 64, 96}), out);
    case 7:
      // More lines than are copied at once.
      return convolution(between(24, 40), pick({64, 130}), 16, 3, pick({1, 2}), 1);
    default:
      // More rows than are copied together.
      return linear(between(100, 400), pick({31, 250, 448}), out);
  }
}

// Nobody has named an instruction set: both kernels are tried, then one is used. Emulated tiles are slower.
void check_choice() {
  expect(std::string(isa()) == kAmx, "AMX is the best instruction set");
  const Layer layer = linear(48, 128, 64);
  const auto first = layer.output();
  for (int i = 0; i < 16; ++i) expect(layer.output() == first, "the same by both kernels");
  const long before = emulated_products();
  expect(!amx_is_emulated() || before > 0, "tiles were tried");
  for (int i = 0; i < 16; ++i) expect(layer.output() == first, "the same by the faster kernel");
  expect(emulated_products() == before, "slow tiles are not used any more");
  const Layer large = linear(48, 256, 64);
  large.output();
  expect(!amx_is_emulated() || emulated_products() > before, "layers of many products are not measured");
}

void check_threads_choosing() {
  threads = 4;
  const Layer layer = linear(1000, 128, 130);
  const auto first = layer.output();
  for (int i = 0; i < 20; ++i) expect(layer.output() == first, "the same with threads that choose");
  threads = 1;
}

// A line of positions with padding, as in convolutions of sounds.
Layer line(int64_t batch, int64_t length) {
  return {{batch, 16, 16, 1, {1, 1, length}, {1, 1, length}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}, {1, 1, 1}},
          false};
}

// What is left out, or wrong, if sizes are taken for those of most layers.
void check_unusual_layers() {
  const int64_t far = int64_t{1} << 40;
  const Layer layers[] = {
      // The only plane of outputs meets padding alone.
      {{1, 64, 16, 1, {1, 8, 8}, {1, 8, 8}, {1, 3, 3}, {3, 1, 1}, {1, 1, 1}, {1, 1, 1}}, false},
      // No products.
      linear(32, 0, 16),
      // Most lines are padding that no tap meets.
      {{1, 64, 16, 1, {1, 8, 8}, {1, 2, 8}, {1, 3, 3}, {1, 2 * far, 1}, {0, far, 1}, {1, 1, 1}}, false},
      {{1, 64, 16, 1, {1, 8, 8}, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, far, 1}, {1, far, 1}}, false},
      line(1, 9000),
      line(3, 2000),
  };
  for (const Layer& layer : layers) {
    for (int64_t t : {1, 3}) {
      threads = t;
      set_isa("avx512_vnni");
      const auto expected = layer.output();
      set_isa(kAmx);
      expect(layer.output() == expected, "unusual layers: the same as by AVX-512 VNNI");
    }
  }
}

// Long lines are no obstacle to several threads.
void check_pieces() {
  for (const Layer& layer : {line(1, 9000), line(3, 2000)}) {
    const int64_t sizes[] = {16, 16, 1, 1, 5};
    const PackedLayout layout(sizes, 5, 1, false);
    const EvenConvolution even(layer.x.data(), 0, layer.shape, layout);
    expect(even.possible() && even.unit() < 100, "lines are cut");
  }
}

// Outputs of any type, most of them with many values that no bound cuts off. A few channels have a scale or a
// bias with which values fit no int32, or are NaN.
Output random_output(Layer* layer) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float unusual[] = {1e7f, -1e7f, 3e38f, infinity, -infinity, std::nanf("")};
  for (int64_t c = 0; c < layer->shape.out_channels; ++c) {
    layer->scale[c] = float(1 + rng() % 100) * 0.01f;
    layer->bias[c] = float(int(rng() % 200)) - 100;
  }
  if (rng() % 3 == 0) {
    const int64_t c = between(0, layer->shape.out_channels - 1);
    (rng() % 2 == 0 ? layer->scale : layer->bias)[c] = unusual[rng() % 6];
  }
  Output as;
  as.type = OutputType(rng() % 4);
  if (bytes_of(as.type) > 1) return as;
  as.scale = double(pick({1, 20, 1000}));
  as.zero_point = between(0, 255) - (as.type == OutputType::s8 ? 128 : 0);
  if (rng() % 2 == 0) as.low = 0;
  if (rng() % 3 == 0) as.high = 40 * as.scale;
  return as;
}

void check_layers(int rounds) {
  int with_tiles = 0;
  for (int i = 0; i < rounds; ++i) {
    Layer layer = random_layer();
    const Output as = random_output(&layer);
    threads = pick({1, 3});
    set_isa("avx512_vnni");
    const auto expected = layer.output(as);
    const long before = emulated_products();
    set_isa(kAmx);
    expect(layer.output(as) == expected, "the same as by AVX-512 VNNI");
    with_tiles += emulated_products() > before;
  }
  // Some layers have too few rows for each thread.
  expect(!amx_is_emulated() || with_tiles > rounds / 2, "tiles were used");
}

int run(int rounds) {
  if (!set_isa("avx512_vnni")) {
    std::printf("skipped: this processor has no AVX-512 VNNI\n");
    return 0;
  }
  check_unusual_layers();
  check_pieces();
  check_layers(rounds);
  std::printf("%ld comparisons, %ld failed, AMX %s\n", long(compared), long(failed),
              amx_is_emulated() ? "emulated" : "of the processor");
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) {
  if (std::string(fastquant::isa()) == fastquant::kAmx) {
    fastquant::check_choice();
    fastquant::check_threads_choosing();
  }
  return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 60);
}
