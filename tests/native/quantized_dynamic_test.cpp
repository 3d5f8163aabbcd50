// Compares layers that quantize their input at each call, for every instruction set, with simple loops in fp64.
// Independent of torch, so that it can run under sanitizers and emulators of other processors.
#include <cstdlib>
#include <limits>
#include <vector>

#include "cpu/half_linear.h"
#include "cpu/quantized/dynamic.h"
#include "cpu/quantized/packing.h"
#include "cpu/quantized/recurrent.h"
#include "quantized_testing.h"

namespace fastquant {
namespace {

struct Weight {
  Weight(int64_t outputs, int64_t inputs)
      : out(outputs),
        in(inputs),
        values(random_bytes<int8_t>(out * in)),
        packed(0),
        scale(1),
        bias(random_floats(out)) {
    const int64_t shape[] = {out, in};
    const PackedLayout layout(shape, 2, 1, false);
    packed = Buffer<uint8_t>(layout.bytes());
    pack_weight(values.data(), layout, packed.data());
    scale[0] = 0.002f;
  }

  LayerScales scales() const { return {scale.data(), false, bias.data()}; }

  // The layer's output for some rows, which are quantized together.
  std::vector<double> of(const float* x, int64_t rows, bool reduce_range) const {
    float low = 0, high = 0;
    for (int64_t i = 0; i < rows * in; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const Quantization q = dynamic_qparams(low, high, reduce_range);
    std::vector<double> y;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < in; ++i) {
          const float inverse = 1.0f / float(q.scale);
          const float level = std::nearbyint(std::fma(x[r * in + i], inverse, float(q.zero_point)));
          sum += (double(std::min(std::max(level, 0.0f), 255.0f)) - double(q.zero_point)) * values[o * in + i];
        }
        y.push_back(sum * q.scale * double(scale[0]) + double(bias[o]));
      }
    }
    return y;
  }

  int64_t out, in;
  Buffer<int8_t> values;
  Buffer<uint8_t> packed;
  Buffer<float> scale, bias;
};

bool close(double a, double b) { return std::fabs(a - b) <= 2e-4 * (1 + std::fabs(b)); }

void check_linear() {
  const int64_t rows = pick({1, 2, 5, 9}), in = pick({1, 3, 16, 40}), out = pick({1, 16, 31, 70});
  const bool relu = rng() % 2 == 0, reduce_range = rng() % 2 == 0;
  const Weight weight(out, in);
  Buffer<float> x = random_floats(rows * in), y(rows * out);
  const auto expected = weight.of(x.data(), rows, reduce_range);
  dynamic_linear(x.data(), Element::f32, rows, in, out, weight.packed.data(), weight.scales(), relu,
                 reduce_range, y.data(), OutputType::f32);
  bool same = true;
  for (int64_t i = 0; i < rows * out; ++i) same &= close(y[i], relu ? std::max(expected[i], 0.0) : expected[i]);
  expect(same, "dynamic linear");
  x[0] = std::numeric_limits<float>::infinity();
  dynamic_linear(x.data(), Element::f32, rows, in, out, weight.packed.data(), weight.scales(), relu,
                 reduce_range, y.data(), OutputType::f32);
  bool kept = true;
  for (int64_t i = 0; i < rows * out; ++i) kept &= std::isnan(y[i]) == (i < out);
  expect(kept, "a row that is not finite");
}

void check_half_linear() {
  const int64_t rows = pick({1, 2, 5, 6, 7, 13}), in = pick({1, 15, 16, 40});
  const int64_t out = pick({1, 3, 16, 40, 70}), panels = (out + kHalfPanel - 1) / kHalfPanel;
  const bool relu = rng() % 2 == 0;
  const Buffer<float> x = random_floats(rows * in), bias = random_floats(out);
  Buffer<Half> weight(panels * kHalfPanel * in);
  for (int64_t i = 0; i < weight.size(); ++i) from_compute(&weight[i], float(between(-64, 64)) / 32.0f);
  const auto weight_of = [&](int64_t o, int64_t i) {
    return double(to_compute(weight[(o / kHalfPanel * in + i) * kHalfPanel + o % kHalfPanel]));
  };
  Buffer<float> y(rows * out);
  half_linear({x.data(), weight.data(), bias.data(), relu, y.data(), rows, in, out});
  bool same = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = double(bias[o]);
      for (int64_t i = 0; i < in; ++i) sum += double(x[r * in + i]) * weight_of(o, i);
      same &= close(y[r * out + o], relu ? std::max(sum, 0.0) : sum);
    }
  }
  expect(same, "linear layer of fp16 weights");
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One step of the first rows of h and c (of an LSTM).
void step(bool is_lstm, const double* x, const std::vector<double>& from_h, int64_t rows, int64_t hidden,
          float* h, float* c) {
  const int64_t gates = is_lstm ? 4 : 3;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t u = 0; u < hidden; ++u) {
      const auto at = [&](int64_t g) { return (r * gates + g) * hidden + u; };
      const auto both = [&](int64_t g) { return x[at(g)] + from_h[at(g)]; };
      float& state = h[r * hidden + u];
      if (is_lstm) {
        float& cell = c[r * hidden + u];
        cell = float(sigmoid(both(1)) * double(cell) + sigmoid(both(0)) * std::tanh(both(2)));
        state = float(sigmoid(both(3)) * std::tanh(double(cell)));
      } else {
        const double fresh = std::tanh(x[at(2)] + from_h[at(2)] * sigmoid(both(0)));
        state = float((double(state) - fresh) * sigmoid(both(1)) + fresh);
      }
    }
  }
}

void check_recurrent(bool is_lstm) {
  const int64_t inputs = pick({1, 3, 20}), hidden = pick({1, 5, 16, 37}), gates = is_lstm ? 4 : 3;
  std::vector<int64_t> counts = {between(1, 5)};
  while (rng() % 4 != 0) counts.push_back(between(1, counts.back()));
  int64_t rows = 0;
  for (int64_t n : counts) rows += n;
  const Weight of_x(gates * hidden, inputs), of_h(gates * hidden, hidden);
  const Buffer<float> x = random_floats(rows * inputs);
  Buffer<float> h = random_floats(counts[0] * hidden), c = random_floats(counts[0] * hidden);
  Buffer<float> y(rows * hidden), expected_h(h.size()), expected_c(c.size()), expected_y(y.size());
  std::copy_n(h.data(), h.size(), expected_h.data());
  std::copy_n(c.data(), c.size(), expected_c.data());
  const Sequences s = {x.data(), counts.data(), rows,           int64_t(counts.size()), counts[0],
                       inputs,   hidden,        rng() % 2 == 0, rng() % 2 == 0};
  const auto from_x = of_x.of(x.data(), rows, s.reduce_range);
  int64_t first = s.reverse ? rows : 0;
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t n = counts[s.reverse ? s.steps - 1 - k : k];
    if (s.reverse) first -= n;
    const auto from_h = of_h.of(expected_h.data(), n, s.reduce_range);
    step(is_lstm, from_x.data() + first * gates * hidden, from_h, n, hidden, expected_h.data(),
         expected_c.data());
    std::copy_n(expected_h.data(), n * hidden, expected_y.data() + first * hidden);
    if (!s.reverse) first += n;
  }
  const RecurrentWeights weights = {of_x.packed.data(), of_h.packed.data(), of_x.scales(), of_h.scales()};
  if (is_lstm) {
    dynamic_lstm(s, weights, y.data(), h.data(), c.data());
  } else {
    dynamic_gru(s, weights, y.data(), h.data());
  }
  // Where the rounding of a hidden state goes another way, a gate changes by a step.
  bool same = true;
  for (int64_t i = 0; i < y.size(); ++i) same &= std::fabs(y[i] - expected_y[i]) <= 0.02;
  for (int64_t i = 0; i < h.size(); ++i) same &= std::fabs(h[i] - expected_h[i]) <= 0.02;
  expect(same, is_lstm ? "LSTM" : "GRU");
}

int run(int rounds) {
  return run_everywhere([&] {
    for (int round = 0; round < rounds; ++round) {
      check_linear();
      check_half_linear();
      check_recurrent(true);
      check_recurrent(false);
    }
  });
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 60); }
