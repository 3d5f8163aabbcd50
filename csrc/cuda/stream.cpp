#include "stream.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels.h"

namespace fastquant::cuda {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// Looks the function up at run time, because linking to libtorch_cuda would require a CUDA build of torch at
// build time. The library is loaded already if there is a CUDA tensor. Before torch 2.13, the stable ABI has
// no other function that returns a stream.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  check(library != nullptr, "libtorch_cuda.so is not loaded");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  check(symbol != nullptr, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

struct OnDevice::Guard {
  explicit Guard(int index) : guard(index) {}
  torch::stable::accelerator::DeviceGuard guard;
};

OnDevice::OnDevice(const torch::stable::Tensor& x) : index_(x.get_device_index()) {
  check(x.is_cuda(), "x must be on a CUDA device");
  if (torch::stable::accelerator::getCurrentDeviceIndex() != index_) guard_ = std::make_unique<Guard>(index_);
}

OnDevice::~OnDevice() = default;

cudaStream_t OnDevice::stream() const {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(index_, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastquant::cuda
