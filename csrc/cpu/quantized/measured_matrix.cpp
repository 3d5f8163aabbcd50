// Chooses between the kernels for AMX and for AVX-512 VNNI by what they take on this machine.
//
// Which one is faster depends on the layer: on its size, and on whether rows have to be copied together. So the
// first parts of each size are computed by both in turns, and timed; later ones by the one whose fastest took
// less time. Nothing is computed for the measurement alone, and nothing is computed twice. Both kernels give
// the same bits, so results do not depend on the choice.
#include "measured_matrix.h"

#include <atomic>

namespace fastquant {

// What is known about parts of one size. Threads may update it at the same time: each value is valid at any
// time, and a choice made from old ones is only a slower one.
struct MatrixRecord {
  static constexpr int64_t kNone = INT64_MAX;

  std::atomic<uint64_t> size{0};  // 0: of none
  std::atomic<uint32_t> begun{0};
  std::atomic<int64_t> best[2] = {{kNone}, {kNone}};  // picoseconds for each row

  int faster() const {
    return best[1].load(std::memory_order_relaxed) < best[0].load(std::memory_order_relaxed) ? 1 : 0;
  }

  void add(int choice, int64_t time) {
    std::atomic<int64_t>& least = best[choice];
    int64_t before = least.load(std::memory_order_relaxed);
    while (time < before && !least.compare_exchange_weak(before, time, std::memory_order_relaxed)) {
    }
  }
};

namespace {

// Whether the n-th part of a size is measured: the first eight are, half of them by each kernel, because other
// threads, cold caches, and a system that interrupts them make single ones slow. All of these may have been
// slow at first, so two are now and then measured again, and ever more rarely.
constexpr uint32_t kMeasuredFirst = 8, kMeasuredAgain = 64;
bool is_measured(uint32_t n) {
  const uint32_t even = n & ~uint32_t{1};
  return n < kMeasuredFirst || (n >= kMeasuredAgain && (even & (even - 1)) == 0);
}

// Fewer rows are never multiplied by tiles.
constexpr int64_t kFewestRows = 8;

// Sizes that records are kept for: more than large models have.
constexpr uint64_t kRecords = 1024, kTries = 8;
MatrixRecord records[kRecords];

// Numbers of rows that differ by less than an eighth count as the same, so that batches of any size need few
// records.
uint64_t rounded(int64_t rows) {
  int shift = 0;
  while (rows >> shift >= 16) ++shift;
  return static_cast<uint64_t>(rows >> shift) << 6 | static_cast<uint64_t>(shift);
}

// Distinguishes different sizes, but for coincidences; never 0.
uint64_t hash(const PartSize& size) {
  uint64_t h = 1;
  const auto add = [&](uint64_t n) {
    h = (h ^ n) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  };
  add(rounded(size.rows));
  for (const int64_t n : size.numbers) add(static_cast<uint64_t>(n));
  return h | 1;
}

// The record of this size; nullptr where there is no place for it.
MatrixRecord* record_of(uint64_t size) {
  for (uint64_t i = 0; i < kTries; ++i) {
    MatrixRecord& record = records[((size >> 1) + i) % kRecords];
    uint64_t there = record.size.load(std::memory_order_relaxed);
    if (there == 0 && record.size.compare_exchange_strong(there, size, std::memory_order_relaxed))
      return &record;
    if (there == size) return &record;
  }
  return nullptr;
}

}  // namespace

void ChosenKernels::choose(const PartSize& size) {
  const MatrixKernels* const choices[] = {kernels_->other, kernels_};
  MatrixRecord* const record = rows_ < kFewestRows ? nullptr : record_of(hash(size));
  if (record != nullptr) {
    const uint32_t n = record->begun.fetch_add(1, std::memory_order_relaxed);
    const bool measured = is_measured(n);
    choice_ = measured ? static_cast<int>(n % 2) : record->faster();
    if (measured) record_ = record, start_ = std::chrono::steady_clock::now();
  }
  kernels_ = choices[choice_];
}

void ChosenKernels::stop() const {
  const std::chrono::nanoseconds time = std::chrono::steady_clock::now() - start_;
  record_->add(choice_, time.count() * 1000 / rows_);
}

}  // namespace fastquant
