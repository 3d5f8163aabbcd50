#include <cuda_runtime.h>

#include "kernels.h"
#include "tickets.h"

namespace fastquant::cuda {
namespace {

constexpr int64_t kCount = 65536;

// A global variable is zeroed when the module is loaded. A cudaMemset would have to run on a stream, which
// may be capturing.
__device__ unsigned pool[kCount];

}  // namespace

TicketPool ticket_pool() {
  void* address = nullptr;
  check_cuda(cudaGetSymbolAddress(&address, pool));
  return {static_cast<unsigned*>(address), kCount};
}

}  // namespace fastquant::cuda
