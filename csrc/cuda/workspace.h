// Scratch memory and tickets for kernels, without an allocation in each call.
//
// Outside of CUDA graph capture, each stream has a block of memory that is never freed. Kernels of one
// stream run one after the other, so each op may use the whole block; a mutex keeps host threads that
// launch on the same stream apart. A captured kernel may later run concurrently with any other kernel, but
// not with itself. So it gets tickets that no other kernel ever uses, and scratch memory from the graph's
// memory pool, which torch does not share with anything that could run at the same time.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace fastquant::cuda {

class Workspace final : public Launcher {
 public:
  // x: any tensor on the current device; memory for captured kernels is allocated like it.
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
