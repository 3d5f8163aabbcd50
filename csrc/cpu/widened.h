// Weights and biases as fp32, which is what convolutions compute in.
#pragma once

#include "arrays.h"

namespace fastquant {

// n numbers as fp32. Only bf16 is copied.
class Widened {
 public:
  Widened(const float* x, int64_t) : data_(x) {}
  Widened(const BFloat16* x, int64_t n)
      : copy_(x == nullptr ? 0 : n), data_(x == nullptr ? nullptr : copy_.data()) {
    if (x != nullptr) kernels().pointwise_bf16.widen(x, n, copy_.data());
  }
  Widened(const Widened&) = delete;
  Widened& operator=(const Widened&) = delete;

  const float* data() const { return data_; }  // null where x is

 private:
  std::vector<float> copy_;
  const float* data_;
};

}  // namespace fastquant
