// Tickets (see Launcher::tickets) for kernels in CUDA graphs.
#pragma once

#include <cstdint>

namespace fastquant::cuda {

struct TicketPool {
  unsigned* tickets;
  int64_t count;
};

// The tickets of the current device. They start at zero, and each is given to one captured kernel only.
// When all are taken, a captured kernel gets new memory that the graph sets to zero in every replay.
TicketPool ticket_pool();

}  // namespace fastquant::cuda
