// Memory for kernels besides their operands, without allocating at each call.
//
// Outside of graphs, each stream has memory of its own, kept for good. Kernels of one stream run
// one after the other, so an op may use all of it; threads that share a stream take turns. A
// kernel recorded in a CUDA graph may later run beside any other, but not beside itself: it gets
// tickets that nothing else will ever use, and scratch memory from the graph's own pool, which
// torch hands to nothing else that could run at the same time.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace fastquant::cuda {

class Workspace final : public Launcher {
 public:
  // x: a tensor of the current device.
  Workspace(const Tensor& x, int device, cudaStream_t stream);
  ~Workspace() override;

  void* scratch(size_t bytes) override;
  unsigned* tickets(int64_t count) override;
  bool is_capturing() const override { return capturing_; }

 private:
  struct StreamMemory;

  StreamMemory& stream_memory();
  void* captured_memory(size_t bytes);

  const Tensor& x_;
  int device_;
  bool capturing_;
  StreamMemory* memory_ = nullptr;
  std::unique_lock<std::mutex> turn_;
  size_t used_ = 0;
  std::vector<Tensor> captured_;
};

}  // namespace fastquant::cuda
