// Checks convolutions by Winograd's algorithm and their gradients against sums of products in fp64, and that
// every instruction set and any number of threads give the same bits. Independent of torch and Python.
//
// Buffers have exactly the size that is needed, so that AddressSanitizer finds any access beyond them.
#include "cpu/winograd.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "math/numbers.h"
#include "testing.h"

namespace fastquant {
namespace {

std::vector<float> random_values(int64_t n, bool integers) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = integers ? std::round(normal(rng) * 3) : normal(rng);
  return values;
}

struct Results {
  std::vector<float> y, grad_x, grad_weight;
  bool finite[3];
};

struct Case {
  Case(const WinogradLayer& sizes, bool of_integers) : layer(sizes), integers(of_integers) {
    const int64_t positions = layer.images * layer.height * layer.width;
    x = random_values(positions * layer.inputs, integers);
    grad = random_values(positions * layer.outputs, integers);
    weight = random_values(layer.outputs * layer.inputs * 9, integers);
    bias = random_values(layer.outputs, integers);
  }

  WinogradLayer layer;
  bool integers;
  std::vector<float> x, grad, weight, bias;

  Results results() const {
    Results r = {
        std::vector<float>(grad.size()), std::vector<float>(x.size()), std::vector<float>(weight.size()), {}};
    r.finite[0] = winograd_convolution(layer, x.data(), weight.data(), bias.data(), r.y.data());
    r.finite[1] = winograd_grad_input(layer, grad.data(), weight.data(), r.grad_x.data());
    r.finite[2] = winograd_grad_weight(layer, grad.data(), x.data(), r.grad_weight.data());
    return r;
  }

  int64_t at(int64_t channels, int64_t n, int64_t c, int64_t row, int64_t column) const {
    if (layer.channels_last) return ((n * layer.height + row) * layer.width + column) * channels + c;
    return ((n * channels + c) * layer.height + row) * layer.width + column;
  }

  // A result may differ from the exact sum by a part of the sum of magnitudes, which bounds rounding errors.
  // Transforms add values of different sizes, so the tolerance is that of the tensor's largest such sum. Sums
  // of small integers are exact.
  struct Sums {
    explicit Sums(size_t n) : values(n), magnitudes(n) {}

    void add(int64_t i, double product) {
      values[static_cast<size_t>(i)] += product;
      magnitudes[static_cast<size_t>(i)] += std::abs(product);
    }

    void expect_near(const std::vector<float>& results, bool exact, const char* what) const {
      double largest = 0;
      for (const double m : magnitudes) largest = std::max(largest, m);
      bool near = true;
      for (size_t i = 0; i < results.size(); ++i) {
        const double error = std::abs(double(results[i]) - values[i]);
        near &= exact ? error == 0 : error <= 1e-6 * largest;
      }
      expect(near, what);
    }

    std::vector<double> values, magnitudes;
  };

  void check(const Results& r) const {
    Sums of_y(grad.size()), of_x(x.size()), of_weight(weight.size());
    const int64_t rows = layer.height, columns = layer.width;
    for (int64_t n = 0; n < layer.images; ++n) {
      for (int64_t o = 0; o < layer.outputs; ++o) {
        for (int64_t p = 0; p < rows * columns; ++p) {
          const int64_t out = at(layer.outputs, n, o, p / columns, p % columns);
          const double g = double(grad[static_cast<size_t>(out)]);
          of_y.add(out, double(bias[static_cast<size_t>(o)]));
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t row = p / columns + t / 3 - 1, column = p % columns + t % 3 - 1;
            if (row < 0 || row >= rows || column < 0 || column >= columns) continue;
            for (int64_t i = 0; i < layer.inputs; ++i) {
              const int64_t in = at(layer.inputs, n, i, row, column), w = (o * layer.inputs + i) * 9 + t;
              const double input = double(x[static_cast<size_t>(in)]),
                           tap = double(weight[static_cast<size_t>(w)]);
              of_y.add(out, input * tap);
              of_x.add(in, g * tap);
              of_weight.add(w, g * input);
            }
          }
        }
      }
    }
    of_y.expect_near(r.y, integers, "convolution");
    of_x.expect_near(r.grad_x, integers, "gradient of its input");
    of_weight.expect_near(r.grad_weight, integers, "gradient of its weight");
    expect(r.finite[0] && r.finite[1] && r.finite[2], "all is finite");
  }
};

template <class X>
bool same_bits(const std::vector<X>& a, const std::vector<X>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(X)) == 0;
}

void test_layer(const WinogradLayer& layer, bool integers = false) {
  const Case c(layer, integers);
  threads = 1;
  set_isa("scalar");
  const Results expected = c.results();
  c.check(expected);
  with_floating_isas([&] {
    for (threads = 1; threads <= 3; threads += 2) {
      const Results r = c.results();
      expect(same_bits(r.y, expected.y), "same convolution as scalar");
      expect(same_bits(r.grad_x, expected.grad_x), "same gradient of the input as scalar");
      expect(same_bits(r.grad_weight, expected.grad_weight), "same gradient of the weight as scalar");
    }
  });
}

// One value that is not finite makes the results that depend on it not finite, and these say so.
void test_nonfinite(float nonfinite) {
  with_floating_isas([&] {
    threads = 1;
    for (int round = 0; round < 10; ++round) {
      Case c({2, 17, 19, 9, 7, rng() % 2 == 0}, false);
      const int64_t which = pick({0, 1, 2});
      std::vector<float>& changed = which == 0 ? c.x : which == 1 ? c.grad : c.weight;
      changed[rng() % changed.size()] = nonfinite;
      const Results r = c.results();
      expect(r.finite[0] == (which == 1), "whether the convolution is finite");
      expect(r.finite[1] == (which == 0), "whether the gradient of the input is finite");
      expect(r.finite[2] == (which == 2), "whether the gradient of the weight is finite");
    }
  });
}

int run(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const WinogradLayer layer = {pick({1, 2, 3, 9}),           pick({1, 3, 16, 17, 40}),
                                 pick({1, 5, 16, 33}),         pick({1, 2, 3, 4, 7, 8, 13}),
                                 pick({1, 2, 3, 4, 7, 8, 13}), rng() % 2 == 0};
    test_layer(layer);
    test_layer(layer, true);
  }
  // Enough for several threads, blocks, sums of parts, and long sums: with few tiles and with many.
  test_layer({2, 64, 72, 31, 33, false});
  test_layer({3, 130, 96, 14, 14, true});
  test_layer({5, 200, 100, 7, 7, false}, true);
  for (const float nonfinite :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    test_nonfinite(nonfinite);
  }
  // Finite values whose products are not.
  Case c({1, 16, 16, 8, 8, false}, false);
  for (float& v : c.x) v = 3e38f;
  const Results r = c.results();
  expect(!r.finite[0] && r.finite[1] && !r.finite[2], "overflow");
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed > 0;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 20); }
