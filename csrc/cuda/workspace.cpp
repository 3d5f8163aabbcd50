#include "workspace.h"

#include <array>
#include <atomic>
#include <map>

#include "tickets.h"

namespace fastquant::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kTicketBytes = kMaxTickets * sizeof(unsigned);
constexpr size_t kFirstBytes = size_t{512} << 10;
constexpr int kMaxDevices = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// During a stream capture, CUDA refuses calls such as cudaMalloc, possibly in other threads too, since they
// might interfere with the capture. Here they do not, so this switches the thread to the relaxed mode,
// which allows them.
class AllowedDuringCapture {
 public:
  AllowedDuringCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~AllowedDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowedDuringCapture(const AllowedDuringCapture&) = delete;
  AllowedDuringCapture& operator=(const AllowedDuringCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int multiprocessors_of(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  check(device >= 0 && device < kMaxDevices, "device ", device, " is beyond the ", kMaxDevices, " supported");
  int count = known[static_cast<size_t>(device)].load(std::memory_order_relaxed);
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    known[static_cast<size_t>(device)].store(count, std::memory_order_relaxed);
  }
  return count;
}

bool records_graph(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  return status == cudaStreamCaptureStatusActive;
}

TicketPool pool_of_device() {
  const AllowedDuringCapture allowed;  // the first call loads the CUDA module, which allocates memory
  return ticket_pool();
}

}  // namespace

// One block of device memory: tickets first, then scratch memory. To grow, it is replaced with a larger
// block; the old block is not freed, since cudaFree would wait for the device.
struct Workspace::StreamMemory {
  std::mutex mutex;
  unsigned char* data = nullptr;
  size_t bytes = 0;

  void grow(size_t needed, cudaStream_t stream) {
    const size_t larger = std::max({kFirstBytes, 2 * bytes, kTicketBytes + aligned(needed)});
    const AllowedDuringCapture allowed;
    void* block = nullptr;
    check_cuda(cudaMalloc(&block, larger));
    check_cuda(cudaMemsetAsync(block, 0, kTicketBytes, stream));
    data = static_cast<unsigned char*>(block);
    bytes = larger;
  }
};

Workspace::Workspace(const Tensor& x, int device, cudaStream_t stream)
    : Launcher(stream, multiprocessors_of(device)), x_(x), device_(device), capturing_(records_graph(stream)) {}

Workspace::~Workspace() = default;

Workspace::StreamMemory& Workspace::stream_memory() {
  if (memory_ != nullptr) return *memory_;
  // Never destroyed: at exit, the CUDA runtime may be torn down before static objects are.
  static auto& mutex = *new std::mutex;
  static auto& of_stream = *new std::map<std::pair<int, unsigned long long>, StreamMemory>;
  unsigned long long id = 0;  // a stream's id is unique, while its handle may be reused
  check_cuda(cudaStreamGetId(stream(), &id));
  {
    const std::lock_guard<std::mutex> lock(mutex);
    memory_ = &of_stream[{device_, id}];
  }
  turn_ = std::unique_lock<std::mutex>(memory_->mutex);
  if (memory_->data == nullptr) memory_->grow(0, stream());
  used_ = kTicketBytes;
  return *memory_;
}

void* Workspace::captured_memory(size_t bytes) {
  captured_.push_back(empty_1d(static_cast<int64_t>(bytes), ScalarType::Byte, x_));
  return captured_.back().mutable_data_ptr();
}

void* Workspace::scratch(size_t bytes) {
  if (capturing_) return captured_memory(bytes);
  StreamMemory& memory = stream_memory();
  if (used_ + bytes > memory.bytes) {
    memory.grow(bytes, stream());
    used_ = kTicketBytes;
  }
  void* start = memory.data + used_;
  used_ += aligned(bytes);
  return start;
}

unsigned* Workspace::tickets(int64_t count) {
  check(count <= kMaxTickets, "more tickets than there are");
  if (!capturing_) return reinterpret_cast<unsigned*>(stream_memory().data);
  static std::array<std::atomic<int64_t>, kMaxDevices> used{};
  const int64_t first = used[static_cast<size_t>(device_)].fetch_add(count);
  const TicketPool pool = pool_of_device();
  if (first + count <= pool.count) return pool.tickets + first;
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  void* own = captured_memory(bytes);
  check_cuda(cudaMemsetAsync(own, 0, bytes, stream()));
  return static_cast<unsigned*>(own);
}

}  // namespace fastquant::cuda
