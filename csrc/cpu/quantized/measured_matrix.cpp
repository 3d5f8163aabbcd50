// Chooses between the kernels for AMX and for AVX-512 VNNI by what they take on this machine.
//
// Which one is faster depends on the product: on its size, and on whether rows have to be copied together. So
// the first products of each size are computed by both in turns, and timed; later ones by the one whose
// fastest took less time. No product is computed for the measurement alone, and nothing is computed twice. Both
// kernels give the same bits, so results do not depend on the choice.
#include <atomic>
#include <chrono>

#include "matrix_amx.h"
#include "packing.h"

namespace fastquant {
namespace {

const MatrixKernels* const kChoices[] = {&kMatrixAvx512Vnni, &kMatrixAvx512Amx};

// Measured products of each size: four by each kernel. Other threads, and a system that interrupts them, make
// single ones slow.
constexpr uint32_t kMeasured = 8;

constexpr int64_t kNone = INT64_MAX;

// What is known about products of one size. Threads may update it at the same time: each value is valid at any
// time, and a choice made from old ones is only a slower one.
struct Record {
  std::atomic<uint64_t> size{0};  // 0: of none
  std::atomic<uint32_t> begun{0};
  std::atomic<int64_t> best[2] = {{kNone}, {kNone}};  // picoseconds for each row

  const MatrixKernels& faster() const {
    const bool second = best[1].load(std::memory_order_relaxed) < best[0].load(std::memory_order_relaxed);
    return *kChoices[second ? 1 : 0];
  }

  void add(int kernel, int64_t time) {
    std::atomic<int64_t>& least = best[kernel];
    int64_t before = least.load(std::memory_order_relaxed);
    while (time < before && !least.compare_exchange_weak(before, time, std::memory_order_relaxed)) {
    }
  }
};

// Sizes that records are kept for: more than large models have.
constexpr uint64_t kRecords = 1024, kTries = 8;
Record records[kRecords];

// Numbers of rows that differ by less than an eighth count as the same, so that batches of any size need few
// records.
uint64_t rounded(int64_t rows) {
  int shift = 0;
  while (rows >> shift >= 16) ++shift;
  return static_cast<uint64_t>(rows >> shift) << 6 | static_cast<uint64_t>(shift);
}

// Distinguishes products of different sizes, but for coincidences; never 0.
uint64_t size_of(const MatrixRows& a, const MatrixWeights& weights, int64_t blocks) {
  const uint64_t numbers[] = {rounded(a.rows), static_cast<uint64_t>(a.segments),
                              static_cast<uint64_t>(a.steps), static_cast<uint64_t>(weights.channels),
                              static_cast<uint64_t>(blocks)};
  uint64_t size = 1;
  for (const uint64_t n : numbers) {
    size = (size ^ n) * 0x9e3779b97f4a7c15u;
    size ^= size >> 32;
  }
  return size | 1;
}

// The record of this size; nullptr where there is no place for it.
Record* record_of(uint64_t size) {
  for (uint64_t i = 0; i < kTries; ++i) {
    Record& record = records[((size >> 1) + i) % kRecords];
    uint64_t there = record.size.load(std::memory_order_relaxed);
    if (there == 0 && record.size.compare_exchange_strong(there, size, std::memory_order_relaxed))
      return &record;
    if (there == size) return &record;
  }
  return nullptr;
}

void multiply(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
              const OutputStage& out, void* scratch) {
  Record* const record = fits_tiles(a, weights) ? record_of(size_of(a, weights, end - begin)) : nullptr;
  if (record == nullptr) return kMatrixAvx512Vnni.multiply(a, weights, begin, end, out, scratch);
  const uint32_t begun = record->begun.load(std::memory_order_relaxed) < kMeasured
                             ? record->begun.fetch_add(1, std::memory_order_relaxed)
                             : kMeasured;
  if (begun >= kMeasured) return record->faster().multiply(a, weights, begin, end, out, scratch);
  const int kernel = static_cast<int>(begun % 2);
  const auto start = std::chrono::steady_clock::now();
  kChoices[kernel]->multiply(a, weights, begin, end, out, scratch);
  const std::chrono::nanoseconds time = std::chrono::steady_clock::now() - start;
  record->add(kernel, time.count() * 1000 / a.rows);
}

// Groups of so few channels would leave most of a tile empty.
void multiply_groups(const MatrixRows& rows, const MatrixWeights& weights, int64_t channels, int64_t begin,
                     int64_t end, const OutputStage& out, void* scratch) {
  kMatrixAvx512Vnni.multiply_groups(rows, weights, channels, begin, end, out, scratch);
}

// Of either kernel.
int64_t scratch_size(int64_t steps, bool in_groups) { return kMatrixAvx512Amx.scratch_size(steps, in_groups); }

}  // namespace

extern const MatrixKernels kMatrixMeasured = {0, scratch_size, multiply, multiply_groups};

}  // namespace fastquant
