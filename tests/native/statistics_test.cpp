// Observing and fake-quantizing over whole tensors, on threads, against loops that anyone can
// read. Like kernels_test it knows no torch: for sanitizers, and for other processors.
#include "cpu/statistics.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/fake_quantize.h"

namespace fastquant {

namespace {
int64_t threads = 4;
}

int64_t thread_count() { return threads; }

void run_parallel(int64_t count, void (*f)(void* context, int64_t i), void* context) {
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < count; ++i) workers.emplace_back(f, context, i);
  for (auto& w : workers) w.join();
}

namespace {

std::mt19937_64 rng(7);
int64_t compared = 0;
int64_t failed = 0;

void expect(bool holds, const char* what) {
  ++compared;
  if (!holds && ++failed <= 20) std::printf("failed: %s (isa %s, %ld threads)\n", what, isa(), long(threads));
}

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

int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }

struct Tensor {
  std::vector<float> data;
  Dense dense;
};

Tensor random_tensor(bool hostile) {
  std::normal_distribution<float> normal;
  const int64_t outer = pick({1, 1, 2, 5, 40}), channels = pick({1, 3, 16, 65}),
                inner = pick({1, 2, 9, 49, 600, 9000});
  Tensor t;
  for (int64_t i = 0; i < std::min<int64_t>(outer * channels * inner, 400000); ++i)
    t.data.push_back(normal(rng));
  const bool whole = int64_t(t.data.size()) == outer * channels * inner;
  t.dense = {t.data.data(), Element::f32, whole ? outer : 1, whole ? channels : 1,
             whole ? inner : int64_t(t.data.size())};
  if (hostile) {
    for (int k = 0; k < 5; ++k) t.data[rng() % t.data.size()] = k % 2 ? NAN : (k % 3 ? kInf : -kInf);
  }
  return t;
}

int64_t channel_of(const Dense& d, int64_t i) { return i / d.inner % d.channels; }

void test_minmax() {
  const bool hostile = rng() % 2 == 0;
  Tensor t = random_tensor(hostile);
  const Dense& d = t.dense;
  std::vector<float> low(d.channels, kInf), high(d.channels, -kInf), true_low = low, true_high = high;
  std::vector<int64_t> count(1, 0);
  int64_t odd = 0;
  for (int64_t i = 0; i < d.numel(); ++i) {
    const float e = t.data[i];
    if (!std::isfinite(e)) {
      ++odd;
      continue;
    }
    const int64_t c = channel_of(d, i);
    true_low[c] = std::min(true_low[c], e);
    true_high[c] = std::max(true_high[c], e);
  }
  observe_minmax(d, array(low, "low"), array(high, "high"), array(count, "count"), std::nullopt,
                 NonFinite::ignore);
  expect(low == true_low && high == true_high && count[0] == odd, "minmax ignoring non-finite values");

  bool raised = false;
  std::vector<float> kept = low;
  try {
    observe_minmax(d, array(low, "low"), array(high, "high"), array(count, "count"), 0.5, NonFinite::raise);
  } catch (const std::runtime_error&) {
    raised = true;
  }
  expect(raised == (odd > 0), "minmax raising");
  if (raised) expect(low == kept, "statistics unchanged by an error");
}

void test_histogram() {
  std::vector<float> histogram(257, 0), low(1, kInf), high(1, -kInf);
  std::vector<int64_t> count(1, 0);
  double seen = 0;
  float scale = 1e-3f;
  for (int round = 0; round < 4; ++round) {
    Tensor t = random_tensor(round == 2);
    float lo = kInf, hi = -kInf;
    for (float& e : t.data) {
      e *= scale;
      seen += std::isfinite(e);
      if (std::isfinite(e)) lo = std::min(lo, e), hi = std::max(hi, e);
    }
    const float before = low[0];
    observe_histogram(t.dense, array(histogram, "histogram"), array(low, "low"), array(high, "high"),
                      array(count, "count"), 16, NonFinite::ignore);
    expect(low[0] <= lo && high[0] >= hi && low[0] <= before, "histogram range");
    double total = 0;
    for (float h : histogram) total += h;
    expect(std::abs(total - seen) <= 1e-5 * seen, "histogram keeps every element");
    scale *= std::pow(10.0f, float(rng() % 9));
  }
  std::vector<float> new_low(1), new_high(1);
  search_histogram_range(array(histogram, "histogram"), array(low, "low"), array(high, "high"), 256,
                         array(new_low, "low"), array(new_high, "high"));
  expect(new_low[0] >= low[0] && new_low[0] < new_high[0] && std::isfinite(new_high[0]), "range search");
}

void test_fake_quantize() {
  Tensor t = random_tensor(false);
  const Dense& d = t.dense;
  const int64_t n = d.numel();
  std::vector<float> scale(d.channels), y(n), back(n);
  std::vector<int32_t> zero_point(d.channels);
  for (int64_t c = 0; c < d.channels; ++c) {
    scale[c] = 0.001f * float(1 + rng() % 20);
    zero_point[c] = int32_t(rng() % 256);
  }
  std::vector<uint64_t> mask(mask_words(n), 0);
  fake_quantize(d, array(scale, "scale"), array(zero_point, "zero_point"), 0, 255, y.data(), mask.data());
  mask_gradient(d, mask.data(), back.data());
  bool values = true, bits = true, gradient = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = channel_of(d, i);
    const float q = float(zero_point[c]) + std::nearbyint(t.data[i] * (1.0f / scale[c]));
    const float expected = (std::min(std::max(q, 0.0f), 255.0f) - float(zero_point[c])) * scale[c];
    const bool inside = q >= 0 && q <= 255;
    values &= y[i] == expected;
    bits &= ((mask[i / 64] >> (i % 64)) & 1u) == inside;
    gradient &= back[i] == (inside ? t.data[i] : 0.0f);
  }
  expect(values, "fake-quantize values");
  expect(bits, "fake-quantize mask");
  expect(gradient, "fake-quantize gradient");
}

// The same buffers from several threads: nothing that one of them saw is lost.
void test_threads() {
  constexpr int kThreads = 4, kRounds = 50, kElements = 1000;
  std::vector<float> histogram(64, 0), low(1, kInf), high(1, -kInf), least(1, kInf), greatest(1, -kInf);
  std::vector<int64_t> count(1, 0), odd(1, 0);
  std::vector<std::thread> workers;
  for (int t = 0; t < kThreads; ++t) {
    workers.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        std::vector<float> x(kElements, float(t * kRounds + round));
        x[0] = NAN;
        const Dense d = {x.data(), Element::f32, 1, 1, kElements};
        observe_minmax(d, array(least, "low"), array(greatest, "high"), array(odd, "count"), std::nullopt,
                       NonFinite::ignore);
        observe_histogram(d, array(histogram, "histogram"), array(low, "low"), array(high, "high"),
                          array(count, "count"), 16, NonFinite::ignore);
      }
    });
  }
  for (auto& w : workers) w.join();
  double total = 0;
  for (float h : histogram) total += h;
  const double seen = double(kThreads * kRounds * (kElements - 1));  // resampling rounds to float
  expect(std::abs(total - seen) < 1e-5 * seen, "histogram counts from several threads");
  expect(odd[0] == kThreads * kRounds && count[0] == kThreads * kRounds,
         "left-out counts from several threads");
  expect(least[0] == 0 && greatest[0] == kThreads * kRounds - 1, "extremes from several threads");
}

int run(int rounds) {
  test_threads();
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    set_isa(usable_isa(i));
    for (int round = 0; round < rounds; ++round) {
      threads = round % 2 == 0 ? 1 : 4;
      test_minmax();
      test_histogram();
      test_fake_quantize();
    }
  }
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 20); }
