// Checks depthwise convolutions and their gradients against sums of products in fp64, and that every
// instruction set and any number of threads give the same bits. Independent of torch and Python.
//
// Buffers have exactly the size that is needed, so that AddressSanitizer finds any access beyond them.
#include "cpu/depthwise.h"

#include <cmath>
#include <cstring>

#include "math/numbers.h"
#include "testing.h"

namespace fastquant {
namespace {

template <class S>
std::vector<S> random_values(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<S> values(static_cast<size_t>(n));
  for (S& v : values) from_compute(&v, normal(rng));
  return values;
}

// All results of a layer.
template <class S>
struct Results {
  std::vector<S> y, grad_x, grad_weight;
};

template <class S>
struct Case {
  DepthwiseLayer layer;
  std::vector<S> x, grad, weight, bias;

  int64_t planes() const { return layer.images * layer.channels; }
  int64_t outputs() const { return planes() * layer.rows() * layer.columns(); }

  Results<S> results(bool in_place) const {
    Results<S> r = {std::vector<S>(static_cast<size_t>(outputs())), std::vector<S>(x.size()),
                    std::vector<S>(weight.size())};
    depthwise_convolution(layer, x.data(), weight.data(), bias.data(), r.y.data());
    if (in_place) r.grad_x = grad;
    depthwise_convolution_backward(layer, in_place ? r.grad_x.data() : grad.data(), x.data(), weight.data(),
                                   r.grad_x.data(), r.grad_weight.data());
    return r;
  }

  // What results may differ from: the exact sums, and the sums of magnitudes that bound the rounding errors.
  void check(const Results<S>& r) const {
    const int64_t k = layer.kernel, rows = layer.rows(), columns = layer.columns();
    struct Sum {
      double value = 0, magnitude = 0;
      void add(double product) { value += product, magnitude += std::abs(product); }
      bool is_near(double result, double rounding) const {
        return std::abs(result - value) <= 1e-6 * magnitude + rounding * std::abs(value);
      }
    };
    const double rounding = sizeof(S) == 2 ? 0x1p-8 : 0x1p-23;
    std::vector<Sum> of_x(x.size()), of_weight(weight.size());
    for (int64_t p = 0; p < planes(); ++p) {
      const int64_t channel = p % layer.channels;
      for (int64_t o = 0; o < rows * columns; ++o) {
        const double g = static_cast<double>(to_compute(grad[p * rows * columns + o]));
        Sum y;
        y.add(static_cast<double>(to_compute(bias[channel])));
        for (int64_t t = 0; t < k * k; ++t) {
          const int64_t r_in = o / columns * layer.stride + t / k - k / 2;
          const int64_t c_in = o % columns * layer.stride + t % k - k / 2;
          if (r_in < 0 || r_in >= layer.height || c_in < 0 || c_in >= layer.width) continue;
          const int64_t i = (p * layer.height + r_in) * layer.width + c_in, w = channel * k * k + t;
          const double value = static_cast<double>(to_compute(x[i])),
                       tap = static_cast<double>(to_compute(weight[w]));
          y.add(value * tap);
          of_x[i].add(g * tap);
          of_weight[w].add(g * value);
        }
        const double result = static_cast<double>(to_compute(r.y[p * rows * columns + o]));
        expect(y.is_near(result, rounding), "output of a depthwise convolution");
      }
    }
    for (size_t i = 0; i < x.size(); ++i) {
      const double result = static_cast<double>(to_compute(r.grad_x[i]));
      expect(of_x[i].is_near(result, rounding), "gradient of its input");
    }
    for (size_t w = 0; w < weight.size(); ++w) {
      const double result = static_cast<double>(to_compute(r.grad_weight[w]));
      expect(of_weight[w].is_near(result, rounding), "gradient of its weight");
    }
  }
};

template <class X>
bool same_bits(const std::vector<X>& a, const std::vector<X>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(X)) == 0;
}

template <class S>
void test_layer(const DepthwiseLayer& layer) {
  Case<S> c;
  c.layer = layer;
  c.x = random_values<S>(c.planes() * layer.height * layer.width);
  c.grad = random_values<S>(c.outputs());
  c.weight = random_values<S>(layer.channels * layer.kernel * layer.kernel);
  c.bias = random_values<S>(layer.channels);
  threads = 1;
  set_isa("scalar");
  const Results<S> expected = c.results(false);
  c.check(expected);
  with_floating_isas([&] {
    for (threads = 1; threads <= 3; threads += 2) {
      const Results<S> r = c.results(c.x.size() == c.grad.size());
      expect(same_bits(r.y, expected.y), "same output as scalar");
      expect(same_bits(r.grad_x, expected.grad_x), "same gradient of the input as scalar");
      expect(same_bits(r.grad_weight, expected.grad_weight), "same gradient of the weight as scalar");
    }
  });
}

int run(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    for (const int64_t kernel : {3, 5, 7}) {
      for (const int64_t stride : {1, 2}) {
        const int64_t height = pick({1, 2, 3, 7, 8, 14, 19, 33}), width = pick({1, 2, 3, 7, 8, 14, 19, 33, 50});
        const DepthwiseLayer layer = {pick({1, 2, 3}), pick({1, 2, 5}), height, width, kernel, stride};
        test_layer<float>(layer);
        test_layer<BFloat16>(layer);
      }
    }
  }
  // Enough for several threads; and a plane of more than one chunk of sums.
  test_layer<float>({2, 5, 112, 128, 3, 1});
  test_layer<float>({2, 5, 113, 127, 3, 2});
  test_layer<float>({1, 2, 150, 150, 5, 1});
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 10); }
