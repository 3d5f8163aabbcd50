// Which of two tables of matrix kernels computes a part of a layer: where there are two, the one that takes
// less time on this machine.
#pragma once

#include <chrono>
#include <cstdint>

#include "kernels.h"
#include "matrix_kernels.h"

namespace fastquant {

// What the time of a part of a layer depends on: its rows, of each the time is compared, and other numbers.
struct PartSize {
  int64_t rows;
  int64_t numbers[9];
};

struct MatrixRecord;

// The kernels for a part of a layer, as long as it is being computed.
class ChosenKernels {
 public:
  // Without measuring, the first of two tables.
  ChosenKernels(const PartSize& size, bool measure) : kernels_(quantized_kernels().matrix), rows_(size.rows) {
    if (measure && kernels_->other != nullptr) choose(size);
  }
  ~ChosenKernels() {
    if (record_ != nullptr) stop();
  }
  ChosenKernels(const ChosenKernels&) = delete;
  ChosenKernels& operator=(const ChosenKernels&) = delete;

  const MatrixKernels& operator*() const { return *kernels_; }

 private:
  void choose(const PartSize& size);
  void stop() const;

  const MatrixKernels* kernels_;
  int64_t rows_;
  MatrixRecord* record_ = nullptr;  // where the time is wanted
  int choice_ = 0;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace fastquant
