// Tickets for kernels in CUDA graphs.
#pragma once

#include <cstdint>

namespace fastquant::cuda {

struct TicketPool {
  unsigned* tickets;
  int64_t count;
};

// Those of the current device: zero, and never given back. When they are used up, graphs clear
// tickets of their own.
TicketPool ticket_pool();

}  // namespace fastquant::cuda
