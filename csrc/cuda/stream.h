// The device and stream that torch has work go to.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace fastquant::cuda {

// Makes a tensor's device the current one while it lives.
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
