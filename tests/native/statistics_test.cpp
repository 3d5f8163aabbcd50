// Compares observing and fake-quantizing whole tensors, in parallel, with simple loops. Like kernels_test, it
// is independent of torch, so that it can run under sanitizers and emulators of other processors.
#include "cpu/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/clamped_sum.h"
#include "cpu/fake_quantize.h"
#include "cpu/ranges.h"
#include "testing.h"

namespace fastquant {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

Array array(std::vector<float>& v, const char* name) {
  return {v.data(), Element::f32, int64_t(v.size()), name};
}
Array array(std::vector<int32_t>& v, const char* name) {
  return {v.data(), Element::i32, int64_t(v.size()), name};
}
Array array(std::vector<int64_t>& v, const char* name) {
  return {v.data(), Element::i64, int64_t(v.size()), name};
}

// Elements of any type that begin `offset` elements into an allocation, which ends after the last of them.
template <class S>
struct Tensor {
  std::vector<S> memory;
  int64_t offset;
  Dense dense;

  S* data() { return memory.data() + offset; }
  Compute<S> at(int64_t i) const { return to_compute(memory[offset + i]); }
  void set(int64_t i, double value) { from_compute(data() + i, static_cast<Compute<S>>(value)); }
};

Element element_of(float) { return Element::f32; }
Element element_of(double) { return Element::f64; }
Element element_of(Half) { return Element::f16; }
Element element_of(BFloat16) { return Element::bf16; }

template <class S>
Tensor<S> random_tensor(bool hostile, double scale = 1) {
  std::normal_distribution<double> normal;
  const int64_t outer = pick({1, 1, 2, 5, 40}), channels = pick({1, 3, 16, 65}),
                inner = pick({1, 2, 9, 49, 600, 9000});
  const int64_t n = std::min<int64_t>(outer * channels * inner, 400000);
  const bool whole = n == outer * channels * inner;
  Tensor<S> t;
  t.offset = pick({0, 1, 2, 3, 5});
  t.memory.resize(t.offset + n);
  for (int64_t i = 0; i < n; ++i) t.set(i, normal(rng) * scale);
  t.dense = {t.data(), element_of(S{}), whole ? outer : 1, whole ? channels : 1, whole ? inner : n};
  if (hostile) {
    for (int k = 0; k < 5; ++k) t.set(int64_t(rng() % n), k % 2 ? NAN : (k % 3 ? kInf : -kInf));
  }
  return t;
}

int64_t channel_of(const Dense& d, int64_t i) { return i / d.inner % d.channels; }

template <class S>
void test_minmax() {
  const bool hostile = rng() % 2 == 0;
  // For float64, some tensors have values outside the range of float32.
  Tensor<S> t = random_tensor<S>(hostile, sizeof(S) == 8 && rng() % 4 == 0 ? 1e39 : 1);
  const Dense& d = t.dense;
  std::vector<float> low(d.channels, kInf), high(d.channels, -kInf), true_low = low, true_high = high;
  std::vector<int64_t> count(1, 0);
  int64_t nonfinite = 0;
  constexpr double kMost = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < d.numel(); ++i) {
    const double e = t.at(i);
    if (!std::isfinite(e)) {
      ++nonfinite;
      continue;
    }
    const int64_t c = channel_of(d, i);
    const float held = static_cast<float>(std::min(std::max(e, -kMost), kMost));
    true_low[c] = std::min(true_low[c], held);
    true_high[c] = std::max(true_high[c], held);
  }
  observe_minmax(d, array(low, "low"), array(high, "high"), array(count, "count"), std::nullopt,
                 NonFinite::ignore);
  expect(low == true_low && high == true_high && count[0] == nonfinite, "minmax ignoring non-finite values");

  bool raised = false;
  std::vector<float> kept = low;
  try {
    observe_minmax(d, array(low, "low"), array(high, "high"), array(count, "count"), 0.5, NonFinite::raise);
  } catch (const std::runtime_error&) {
    raised = true;
  }
  expect(raised == (nonfinite > 0), "minmax raising");
  if (raised) expect(low == kept, "statistics unchanged by an error");
}

template <class S>
void test_histogram() {
  std::vector<float> histogram(257, 0), low(1, kInf), high(1, -kInf);
  std::vector<int64_t> count(1, 0);
  double seen = 0, scale = 1e-3;
  // Values grow up to this limit: within the range of float16 for 16-bit types, beyond float32 for float64.
  const double most = sizeof(S) == 2 ? 1e3 : sizeof(S) == 4 ? 1e30 : 1e300;
  for (int round = 0; round < 4; ++round) {
    Tensor<S> t = random_tensor<S>(round == 2, scale);
    double lo = kInf, hi = -kInf;
    for (int64_t i = 0; i < t.dense.numel(); ++i) {
      const double e = t.at(i);
      seen += std::isfinite(e);
      if (std::isfinite(e)) lo = std::min(lo, e), hi = std::max(hi, e);
    }
    const float before = low[0];
    observe_histogram(t.dense, array(histogram, "histogram"), array(low, "low"), array(high, "high"),
                      array(count, "count"), 16, NonFinite::ignore, 1);
    constexpr float kMost = std::numeric_limits<float>::max();
    expect(low[0] <= std::max(float(lo), -kMost) && high[0] >= std::min(float(hi), kMost) && low[0] <= before &&
               std::isfinite(low[0]) && std::isfinite(high[0]),
           "histogram range");
    double total = 0;
    for (float h : histogram) total += h;
    expect(std::abs(total - seen) <= 1e-5 * seen, "histogram keeps every element");
    scale = std::min(scale * std::pow(10.0, double(rng() % 9)), most);
    if (sizeof(S) == 8 && round == 2 && rng() % 4 == 0) scale = most;
  }
  std::vector<float> new_low(1), new_high(1);
  search_histogram_range(array(histogram, "histogram"), array(low, "low"), array(high, "high"), 256,
                         array(new_low, "low"), array(new_high, "high"));
  expect(new_low[0] >= low[0] && new_low[0] < new_high[0] && std::isfinite(new_high[0]), "range search");
}

template <class S>
void test_fake_quantize() {
  using T = Compute<S>;
  Tensor<S> t = random_tensor<S>(false);
  const Dense& d = t.dense;
  const int64_t n = d.numel();
  std::vector<float> scale(d.channels);
  std::vector<int32_t> zero_point(d.channels);
  for (int64_t c = 0; c < d.channels; ++c) {
    scale[c] = 0.001f * float(1 + rng() % 20);
    zero_point[c] = int32_t(rng() % 256);
  }
  std::vector<uint64_t> mask(mask_words(n), 0);
  Tensor<S> y = t, back = t;
  fake_quantize(d, array(scale, "scale"), array(zero_point, "zero_point"), 0, 255, y.data(), mask.data());
  mask_gradient(d, mask.data(), back.data());
  bool values = true, bits = true, gradient = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = channel_of(d, i);
    const T q = T(zero_point[c]) + std::nearbyint(t.at(i) * T(1.0f / scale[c]));
    S expected;
    from_compute(&expected, (std::min(std::max(q, T(0)), T(255)) - T(zero_point[c])) * T(scale[c]));
    const bool inside = q >= 0 && q <= 255;
    values &= y.at(i) == to_compute(expected);
    bits &= ((mask[i / 64] >> (i % 64)) & 1u) == inside;
    gradient &= back.at(i) == (inside ? t.at(i) : T(0));
  }
  expect(values, "fake-quantize values");
  expect(bits, "fake-quantize mask");
  expect(gradient, "fake-quantize gradient");
}

// What observing and fake-quantizing leave behind.
template <class S>
struct Outcome {
  std::vector<float> low{-0.5f}, high{0.25f}, scale{1}, eps{1e-6f};
  std::vector<int32_t> zero_point{0};
  std::vector<int64_t> count{0};
  std::vector<uint64_t> mask;
  Tensor<S> y;
  bool raised = false;

  explicit Outcome(const Tensor<S>& x) : mask(mask_words(x.dense.numel()), 0), y(x) {}
  FusedBuffers buffers() {
    return {array(low, "low"),         array(high, "high"),   array(scale, "scale"),
            array(zero_point, "zero"), array(count, "count"), array(eps, "eps")};
  }
  template <class F>
  void attempt(const F& f) {
    try {
      f();
    } catch (const NonfiniteElements&) {
      raised = true;
    }
  }
  // The same bits, also where there are NaN.
  bool operator==(const Outcome& o) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return same(low, o.low) && same(high, o.high) && same(scale, o.scale) && zero_point == o.zero_point &&
           count == o.count && raised == o.raised && mask == o.mask && same(y.memory, o.y.memory);
  }
};

// Both passes together do what one after the other does, for a tensor and for a sum of two.
template <class S>
void test_observe_fake_quantize() {
  Tensor<S> x = random_tensor<S>(rng() % 3 == 0), other = x;
  const int64_t n = x.dense.numel();
  x.dense = {x.data(), element_of(S{}), 1, 1, n};
  std::shuffle(other.memory.begin() + other.offset, other.memory.end(), rng);
  const auto policy = static_cast<NonFinite>(pick({0, 1, 2}));
  const ObserveSettings settings = {std::nullopt, 0.25, {0, 255, Scheme::affine, 0}, policy};
  at_once = rng() % 2 == 0;

  Outcome<S> together(x), apart(x);
  together.attempt([&] {
    observe_fake_quantize(x.dense, together.buffers(), settings, together.y.data(), together.mask.data());
  });
  apart.attempt([&] {
    const FusedBuffers b = apart.buffers();
    observe_qparams(x.dense, b, settings);
    fake_quantize(x.dense, b.scale, b.zero_point, 0, 255, apart.y.data(), apart.mask.data());
  });
  expect(together == apart, "observing and fake-quantizing together");

  const SumOfTensors sum = {x.dense, other.data(), 0, kInf};
  Outcome<S> sum_together(x), sum_apart(x);
  sum_together.attempt([&] {
    observe_fake_quantize_clamped_sum(sum, sum_together.buffers(), settings, sum_together.y.data(),
                                      sum_together.mask.data());
  });
  sum_apart.attempt([&] {
    const FusedBuffers b = sum_apart.buffers();
    observe_clamped_sum(sum, b, settings);
    fake_quantize_clamped_sum(sum, b.scale, b.zero_point, 0, 255, sum_apart.y.data(), sum_apart.mask.data());
  });
  expect(sum_together == sum_apart, "observing and fake-quantizing a sum together");
  at_once = true;
}

template <class S>
void test_type() {
  test_observe_fake_quantize<S>();
  test_minmax<S>();
  test_histogram<S>();
  test_fake_quantize<S>();
}

// Several threads update the same buffers at once. No thread's observation may be lost.
void test_threads() {
  constexpr int kThreads = 4, kRounds = 50, kElements = 1000;
  std::vector<float> histogram(64, 0), low(1, kInf), high(1, -kInf), least(1, kInf), greatest(1, -kInf);
  std::vector<int64_t> count(1, 0), left_out(1, 0);
  std::vector<std::thread> workers;
  for (int t = 0; t < kThreads; ++t) {
    workers.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        std::vector<float> x(kElements, float(t * kRounds + round));
        x[0] = NAN;
        const Dense d = {x.data(), Element::f32, 1, 1, kElements};
        observe_minmax(d, array(least, "low"), array(greatest, "high"), array(left_out, "count"), std::nullopt,
                       NonFinite::ignore);
        observe_histogram(d, array(histogram, "histogram"), array(low, "low"), array(high, "high"),
                          array(count, "count"), 16, NonFinite::ignore, 1);
      }
    });
  }
  for (auto& w : workers) w.join();
  double total = 0;
  for (float h : histogram) total += h;
  const double seen = double(kThreads * kRounds * (kElements - 1));  // resampling rounds to float
  expect(std::abs(total - seen) < 1e-5 * seen, "histogram counts from several threads");
  expect(left_out[0] == kThreads * kRounds && count[0] == kThreads * kRounds,
         "left-out counts from several threads");
  expect(least[0] == 0 && greatest[0] == kThreads * kRounds - 1, "extremes from several threads");
}

int run(int rounds) {
  threads = 4;
  test_threads();
  with_floating_isas([&] {
    for (int round = 0; round < rounds; ++round) {
      threads = round % 2 == 0 ? 1 : 4;
      test_type<float>();
      test_type<double>();
      test_type<Half>();
      test_type<BFloat16>();
    }
  });
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 10); }
