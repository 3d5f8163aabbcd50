#include <cuda_runtime.h>

#include "kernels.h"
#include "tickets.h"

namespace fastquant::cuda {
namespace {

constexpr int64_t kCount = 65536;

// Zero when the module is loaded, which needs no stream and cannot disturb a capture.
__device__ unsigned pool[kCount];

}  // namespace

TicketPool ticket_pool() {
  void* address = nullptr;
  check_cuda(cudaGetSymbolAddress(&address, pool));
  return {static_cast<unsigned*>(address), kCount};
}

}  // namespace fastquant::cuda
