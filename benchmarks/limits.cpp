// What limits the histogram on one thread: measures counting elements whose bins are already known,
// the whole kernel, and reading. Every element takes one increment in memory, except for a value that
// fills much of a tensor, such as zero after ReLU, which the kernel counts apart.
//
//   make limits
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace fastquant {
namespace {

constexpr int64_t kElements = 64 * 56 * 56, kBins = 2048;

template <class F>
double nanoseconds_per_element(const F& f) {
  std::vector<double> times;
  for (int round = 0; round < 201; ++round) {
    const auto start = std::chrono::steady_clock::now();
    f();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 100, times.end());
  return times[100] * 1e9 / kElements;
}

// Like the kernels: into four tables in turn, so that no increment waits for the one before.
void count(const std::vector<uint32_t>& bins, uint32_t* tables, int64_t stride) {
  for (int64_t i = 0; i < kElements; i += 4) {
    uint64_t pairs[2];
    std::memcpy(pairs, &bins[i], sizeof pairs);
    ++tables[pairs[0] & 0xffffffffu];
    ++tables[stride + static_cast<int64_t>(pairs[0] >> 32)];
    ++tables[2 * stride + static_cast<int64_t>(pairs[1] & 0xffffffffu)];
    ++tables[3 * stride + static_cast<int64_t>(pairs[1] >> 32)];
  }
}

void run() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kElements);
  for (float& e : x) e = normal(random);
  float low, high;
  bool nonfinite;
  const auto& kernels = fastquant::kernels();
  kernels.f32.minmax(x.data(), kElements, &low, &high, &nonfinite);
  std::vector<uint32_t> bins(kElements), tables(static_cast<size_t>(4 * histogram_stride(kBins)));
  for (int64_t i = 0; i < kElements; ++i) {
    bins[i] = std::min<uint32_t>(kBins - 1, static_cast<uint32_t>((x[i] - low) * kBins / (high - low)));
  }
  std::printf("%s, %ld normally distributed fp32, %ld bins; ns an element, median of 201 rounds\n", kernels.isa,
              long(kElements), long(kBins));
  std::printf("minimum and maximum          %.3f\n", nanoseconds_per_element([&] {
                kernels.f32.minmax(x.data(), kElements, &low, &high, &nonfinite);
              }));
  std::printf("counting known bins          %.3f\n",
              nanoseconds_per_element([&] { count(bins, tables.data(), histogram_stride(kBins)); }));
  std::printf("finding bins and counting    %.3f\n", nanoseconds_per_element([&] {
                kernels.f32.histogram(x.data(), kElements, low, high, kBins, tables.data(), 4);
              }));
}

}  // namespace
}  // namespace fastquant

int main() { fastquant::run(); }
