// Checks convolutions by tiles and their gradients against sums of products in fp64, and that any number of
// threads gives the same bits. On processors without AMX, its instructions are emulated; without AVX-512 VNNI,
// nothing is tested. Independent of torch and Python.
//
// Results have exactly the size that is needed, so that AddressSanitizer finds any access beyond them.
#include "cpu/tiled_convolution.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "amx_emulation.h"
#include "testing.h"

namespace fastquant {
namespace {

using Values = std::vector<BFloat16>;

Values random_values(int64_t n, bool integers) {
  std::normal_distribution<float> normal;
  Values values(static_cast<size_t>(n));
  for (BFloat16& v : values) from_compute(&v, integers ? std::round(normal(rng) * 3) : normal(rng));
  return values;
}

struct Results {
  Values y, grad_x, grad_weight;
  bool finite[3];
};

// What is exact, and the sum of magnitudes, which bounds rounding errors.
struct Sums {
  explicit Sums(size_t n) : values(n), magnitudes(n) {}

  void add(int64_t i, double product) {
    values[static_cast<size_t>(i)] += product;
    magnitudes[static_cast<size_t>(i)] += std::abs(product);
  }

  void expect_near(const Values& results, bool exact, const char* what) const {
    bool near = true;
    for (size_t i = 0; i < results.size(); ++i) {
      const double result = double(to_compute(results[i]));
      BFloat16 rounded;
      from_compute(&rounded, float(values[i]));
      const double tolerance = 0x1p-8 * std::abs(values[i]) + 1e-5 * magnitudes[i];
      near &= exact ? result == double(to_compute(rounded)) : std::abs(result - values[i]) <= tolerance;
    }
    expect(near, what);
  }

  std::vector<double> values, magnitudes;
};

struct Case {
  Case(const TiledLayer& sizes, bool of_integers) : layer(sizes), integers(of_integers) {
    const int64_t positions = layer.images * layer.height * layer.width;
    x = random_values(positions * layer.inputs, integers);
    grad = random_values(positions * layer.outputs, integers);
    weight = random_values(layer.outputs * layer.inputs * layer.kernel * layer.kernel, integers);
    bias = random_values(layer.outputs, integers);
  }

  Results results() const {
    Results r = {Values(grad.size()), Values(x.size()), Values(weight.size()), {}};
    r.finite[0] = tiled_convolution(layer, x.data(), weight.data(), bias.data(), r.y.data());
    r.finite[1] = tiled_grad_input(layer, grad.data(), weight.data(), r.grad_x.data());
    r.finite[2] = tiled_grad_weight(layer, grad.data(), x.data(), r.grad_weight.data());
    return r;
  }

  static double at(const Values& values, int64_t i) {
    return double(to_compute(values[static_cast<size_t>(i)]));
  }

  void check(const Results& r) const {
    Sums of_y(grad.size()), of_x(x.size()), of_weight(weight.size());
    const int64_t rows = layer.height, columns = layer.width, kernel = layer.kernel, taps = kernel * kernel;
    for (int64_t n = 0; n < layer.images; ++n) {
      for (int64_t o = 0; o < layer.outputs; ++o) {
        for (int64_t p = 0; p < rows * columns; ++p) {
          const int64_t out = (n * layer.outputs + o) * rows * columns + p;
          of_y.add(out, at(bias, o));
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t row = p / columns + t / kernel - kernel / 2;
            const int64_t column = p % columns + t % kernel - kernel / 2;
            if (row < 0 || row >= rows || column < 0 || column >= columns) continue;
            for (int64_t i = 0; i < layer.inputs; ++i) {
              const int64_t in = ((n * layer.inputs + i) * rows + row) * columns + column;
              const int64_t w = (o * layer.inputs + i) * taps + t;
              of_y.add(out, at(x, in) * at(weight, w));
              of_x.add(in, at(grad, out) * at(weight, w));
              of_weight.add(w, at(grad, out) * at(x, in));
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

  TiledLayer layer;
  bool integers;
  Values x, grad, weight, bias;
};

bool same_bits(const Values& a, const Values& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(BFloat16)) == 0;
}

void test_layer(const TiledLayer& layer, bool integers = false) {
  const Case c(layer, integers);
  threads = 1;
  const Results expected = c.results();
  c.check(expected);
  for (threads = 2; threads <= 5; threads += 3) {
    const Results r = c.results();
    expect(same_bits(r.y, expected.y), "same convolution with several threads");
    expect(same_bits(r.grad_x, expected.grad_x), "same gradient of the input with several threads");
    expect(same_bits(r.grad_weight, expected.grad_weight), "same gradient of the weight with several threads");
  }
  threads = 1;
}

// One value that is not finite makes the results that depend on it not finite, and these say so.
void test_nonfinite(float nonfinite) {
  for (int round = 0; round < 10; ++round) {
    Case c({2, 17, 19, 9, 7, pick({1, 3})}, false);
    const int64_t which = pick({0, 1, 2});
    Values& changed = which == 0 ? c.x : which == 1 ? c.grad : c.weight;
    from_compute(&changed[rng() % changed.size()], nonfinite);
    const Results r = c.results();
    expect(r.finite[0] == (which == 1), "whether the convolution is finite");
    expect(r.finite[1] == (which == 0), "whether the gradient of the input is finite");
    expect(r.finite[2] == (which == 2), "whether the gradient of the weight is finite");
  }
}

int run(int rounds) {
  if (!has_tiles()) {
    std::printf("skipped: this processor has no AVX-512 VNNI\n");
    return 0;
  }
  for (int round = 0; round < rounds; ++round) {
    const TiledLayer layer = {pick({1, 2, 3, 9}),           pick({1, 3, 16, 17, 40}),     pick({1, 5, 16, 33}),
                              pick({1, 2, 3, 4, 7, 8, 13}), pick({1, 2, 3, 4, 7, 8, 13}), pick({1, 3})};
    test_layer(layer);
    test_layer(layer, true);
  }
  // Enough for several threads, groups of images, and long lines.
  test_layer({2, 64, 40, 31, 33, 3});
  test_layer({9, 130, 40, 7, 7, 3}, true);
  test_layer({2, 32, 33, 3, 1100, 3}, true);
  test_layer({3, 100, 50, 40, 41, 1}, true);
  test_layer({12, 40, 70, 28, 28, 1});
  for (const float nonfinite :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    test_nonfinite(nonfinite);
  }
  std::printf("%ld comparisons, %ld failed, AMX %s\n", long(compared), long(failed),
              amx_is_emulated() ? "emulated" : "of the processor");
  return failed > 0;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 6); }
