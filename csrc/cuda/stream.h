// Torch's current device and stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace fastquant::cuda {

// A guard that makes x's device the current one until it is destroyed.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& x);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int index() const { return index_; }
  cudaStream_t stream() const;

 private:
  struct Guard;

  int index_;
  std::unique_ptr<Guard> guard_;
};

}  // namespace fastquant::cuda
