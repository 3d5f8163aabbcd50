// Replaces csrc/cuda/stream.cpp and tickets.cu in the emulation, and exports the emulation's settings to
// the Python tests.
#include "cuda/stream.h"

#include "cuda/tickets.h"
#include "emulation.h"

namespace fastquant::cuda {

struct OnDevice::Guard {};

OnDevice::OnDevice(const torch::stable::Tensor&) : index_(0) {}
OnDevice::~OnDevice() = default;
cudaStream_t OnDevice::stream() const { return nullptr; }

// So few that the tests also reach the case where none are left.
TicketPool ticket_pool() {
  static unsigned tickets[64] = {};
  return {tickets, 64};
}

}  // namespace fastquant::cuda

extern "C" {
__attribute__((visibility("default"))) int64_t emulation_launches() { return emulation::launches(); }
__attribute__((visibility("default"))) void emulation_set_capturing(int capturing) {
  emulation::set_capturing(capturing != 0);
}
__attribute__((visibility("default"))) void emulation_set_multiprocessors(int count) {
  emulation::set_multiprocessors(count);
}
__attribute__((visibility("default"))) void emulation_seed(uint64_t value) { emulation::seed(value); }
}
