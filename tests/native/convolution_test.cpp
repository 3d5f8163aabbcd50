// Compares convolutions of fp32 and their gradients with sums in double, and their bits between instruction
// sets.

#include <cmath>
#include <string>
#include <vector>

#include "cpu/pointwise.h"
#include "math/numbers.h"
#include "quantized_testing.h"

namespace fastquant {
namespace {

// Calls f, which returns a buffer, with the instruction set and the threads in use, and compares: several
// threads with one, and one with the scalar kernels, which take too long to be asked both times.
template <class F>
Buffer<float> with_same_bits(const F& f, const char* what) {
  const std::string used = isa();
  const int64_t used_threads = threads;
  Buffer<float> y = f();
  if (threads == 1) set_isa("scalar");
  threads = 1;
  expect(f() == y, what);
  set_isa(used.c_str());
  threads = used_threads;
  return y;
}

// Sums of n products of random numbers of up to 2.
bool close(float y, double expected, int64_t n) { return std::fabs(double(y) - expected) <= 2e-6 * double(n); }

// Where positions are few, units are shared by images, of which there are enough for several such units.
Pointwise random_sizes() {
  const int64_t positions = pick({1, 2, 4, 9, 16, 49, 100, 800});
  return {positions < 16 ? between(1, 50) : between(1, 5), pick({1, 3, 16, 24, 65}), pick({1, 5, 12, 25, 70}),
          positions};
}

void check_pointwise(const Pointwise& s) {
  const bool channels_last = rng() % 2 == 0;
  const Buffer<float> x = random_floats(s.images * s.inputs * s.positions);
  const Buffer<float> grad = random_floats(s.images * s.outputs * s.positions);
  const Buffer<float> weight = random_floats(s.outputs * s.inputs), bias = random_floats(s.outputs);
  const bool has_bias = rng() % 2 == 0;
  const auto at = [&](int64_t channels, int64_t n, int64_t c, int64_t p) {
    return channels_last ? (n * s.positions + p) * channels + c : (n * channels + c) * s.positions + p;
  };

  const Buffer<float> y = with_same_bits(
      [&] {
        Buffer<float> out(grad.size());
        const auto f = channels_last ? pointwise_convolution_channels_last : pointwise_convolution<float>;
        f(s, x.data(), weight.data(), has_bias ? bias.data() : nullptr, out.data());
        return out;
      },
      "bits of a pointwise convolution");
  const Buffer<float> grad_x = with_same_bits(
      [&] {
        Buffer<float> out(x.size());
        const auto f = channels_last ? pointwise_grad_input_channels_last : pointwise_grad_input<float>;
        f(s, grad.data(), weight.data(), out.data());
        return out;
      },
      "bits of its gradient of the input");
  const Buffer<float> grad_weight = with_same_bits(
      [&] {
        Buffer<float> out(weight.size());
        const auto f = channels_last ? pointwise_grad_weight_channels_last : pointwise_grad_weight<float>;
        f(s, grad.data(), x.data(), out.data());
        return out;
      },
      "bits of its gradient of the weight");

  bool of_y = true, of_x = true, of_weight = true;
  std::vector<double> sums(size_t(weight.size()));
  for (int64_t n = 0; n < s.images; ++n) {
    for (int64_t p = 0; p < s.positions; ++p) {
      for (int64_t o = 0; o < s.outputs; ++o) {
        double sum = has_bias ? double(bias[o]) : 0;
        const double g = double(grad[at(s.outputs, n, o, p)]);
        for (int64_t i = 0; i < s.inputs; ++i) {
          const double value = double(x[at(s.inputs, n, i, p)]);
          sum += value * double(weight[o * s.inputs + i]);
          sums[size_t(o * s.inputs + i)] += value * g;
        }
        of_y &= close(y[at(s.outputs, n, o, p)], sum, s.inputs + 1);
      }
      for (int64_t i = 0; i < s.inputs; ++i) {
        double sum = 0;
        for (int64_t o = 0; o < s.outputs; ++o)
          sum += double(grad[at(s.outputs, n, o, p)]) * double(weight[o * s.inputs + i]);
        of_x &= close(grad_x[at(s.inputs, n, i, p)], sum, s.outputs);
      }
    }
  }
  for (int64_t i = 0; i < weight.size(); ++i)
    of_weight &= close(grad_weight[i], sums[size_t(i)], s.images * s.positions);
  expect(of_y, "pointwise convolution");
  expect(of_x, "its gradient of the input");
  expect(of_weight, "its gradient of the weight");
}

// Random bf16, and the same numbers as fp32.
struct Narrow {
  explicit Narrow(int64_t n) : values(n), wide(random_floats(n)) {
    for (int64_t i = 0; i < n; ++i) {
      from_compute(&values[i], wide[i]);
      wide[i] = to_compute(values[i]);
    }
  }

  Buffer<BFloat16> values;
  Buffer<float> wide;
};

void expect_rounded(const Buffer<BFloat16>& y, const Buffer<float>& wide, const char* what) {
  bool same = true;
  for (int64_t i = 0; i < y.size(); ++i) {
    BFloat16 rounded;
    from_compute(&rounded, wide[i]);
    same &= to_compute(rounded) == to_compute(y[i]);
  }
  expect(same, what);
}

// In bf16, results are those of fp32, rounded.
void check_narrow_pointwise(const Pointwise& s) {
  const Narrow x(s.images * s.inputs * s.positions), grad(s.images * s.outputs * s.positions);
  const Narrow weight(s.outputs * s.inputs), bias(s.outputs);
  Buffer<BFloat16> y(grad.values.size()), grad_x(x.values.size()), grad_weight(weight.values.size());
  Buffer<float> wide_y(y.size()), wide_grad_x(grad_x.size()), wide_grad_weight(grad_weight.size());
  pointwise_convolution(s, x.values.data(), weight.values.data(), bias.values.data(), y.data());
  pointwise_convolution(s, x.wide.data(), weight.wide.data(), bias.wide.data(), wide_y.data());
  expect_rounded(y, wide_y, "pointwise convolution of bf16");
  pointwise_grad_input(s, grad.values.data(), weight.values.data(), grad_x.data());
  pointwise_grad_input(s, grad.wide.data(), weight.wide.data(), wide_grad_x.data());
  expect_rounded(grad_x, wide_grad_x, "its gradient of the input");
  pointwise_grad_weight(s, grad.values.data(), x.values.data(), grad_weight.data());
  pointwise_grad_weight(s, grad.wide.data(), x.wide.data(), wide_grad_weight.data());
  expect_rounded(grad_weight, wide_grad_weight, "its gradient of the weight");
}

int run(int rounds) {
  return run_everywhere([&] {
    for (int round = 0; round < rounds; ++round) {
      check_pointwise(random_sizes());
      check_narrow_pointwise(random_sizes());
    }
    // Long sums, and more positions than are summed in fp32.
    for (const Pointwise& s : {Pointwise{1, 700, 300, 9}, Pointwise{300, 40, 70, 1}, Pointwise{3, 7, 3, 20000},
                               Pointwise{40, 12, 20, 900}}) {
      check_pointwise(s);
    }
    // More threads than there are units, rows, or blocks of weights. So many products take long on one thread.
    if (threads == 1) return;
    const int64_t used_threads = threads;
    threads = 8;
    for (const Pointwise& s :
         {Pointwise{1, 1400, 1400, 9}, Pointwise{1100, 128, 128, 1}, Pointwise{20, 24, 40, 900}}) {
      check_pointwise(s);
    }
    threads = used_threads;
  });
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 20); }
