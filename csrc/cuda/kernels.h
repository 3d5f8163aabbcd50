// What a GPU does over memory of its own: each function starts kernels on a stream and waits
// for nothing, except under NonFinite::raise. Free of torch, like the CPU code beside it, and
// with the same results; ops.cpp wraps it.
#pragma once

#include <cuda_runtime_api.h>

#include "../math/qparams.h"
#include "../memory.h"

namespace fastquant::cuda {

// Throws what a call of the CUDA runtime complains of, and what to do where these kernels, other
// than torch's, do not run on a GPU or with its driver.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  const bool runs_here = error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&
                         error != cudaErrorUnsupportedPtxVersion && error != cudaErrorInsufficientDriver;
  check(false, "CUDA: ", cudaGetErrorString(error),
        runs_here ? "" : "; the environment variable FASTQUANT_CUDA_KERNELS=0 has plain torch ops do the work");
}

// Where an op starts its kernels, and the memory that it may use while they run. Other kernels
// of the same stream run before or after all kernels of the op, never between them.
class Launcher {
 public:
  Launcher(cudaStream_t stream, int multiprocessors) : stream_(stream), multiprocessors_(multiprocessors) {}
  virtual ~Launcher() = default;
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  // Memory of any content, aligned to 256 bytes, until the op is over.
  virtual void* scratch(size_t bytes) = 0;
  // Counters that are zero, and that kernels leave at zero; asked for once a kernel.
  virtual unsigned* tickets(int64_t count) = 0;
  // Whether the stream records a graph, and nothing can be waited for.
  virtual bool is_capturing() const = 0;

 private:
  cudaStream_t stream_;
  int multiprocessors_;
};

// Most tickets that anything asks for.
constexpr int64_t kMaxTickets = 4096;

// A flag on the device, an integer of 1, 2, 4 or 8 bytes, zero for off. Without data it is on.
struct Flag {
  const void* data = nullptr;
  int bytes = 0;
};

struct ObserveBuffers {
  Array min_val, max_val, nonfinite_count;
};

struct QParamBuffers {
  Array scale, zero_point, eps;
};

struct QuantRange {
  int64_t min, max;
};

void observe_minmax(Launcher& launcher, const Dense& x, const ObserveBuffers& buffers,
                    std::optional<double> averaging_constant, NonFinite policy);

void observe_qparams(Launcher& launcher, const Dense& x, Flag enabled, const ObserveBuffers& buffers,
                     const QParamBuffers& qparams, std::optional<double> averaging_constant,
                     const QParamsConfig& config, NonFinite policy);

// NaN cannot raise without waiting: under NonFinite::propagate it makes the range NaN.
void observe_histogram(Launcher& launcher, const Dense& x, const Array& histogram,
                       const ObserveBuffers& buffers, int64_t upsample_rate, NonFinite policy, int64_t times);

void choose_qparams(Launcher& launcher, const Array& min_val, const Array& max_val,
                    const QParamBuffers& qparams, const QParamsConfig& config);

void search_histogram_range(Launcher& launcher, const Array& histogram, const Array& min_val,
                            const Array& max_val, int64_t levels, const Array& new_min, const Array& new_max);

// mask may be null. Where not enabled, y is x and every bit of the mask is set.
void fake_quantize(Launcher& launcher, const Dense& x, Flag enabled, const Array& scale,
                   const Array& zero_point, QuantRange range, void* y, uint64_t* mask);

// To int8, with zero points of zero.
void quantize_per_channel(Launcher& launcher, const Dense& x, const Array& scale, QuantRange range,
                          int8_t* out);

// observe_qparams, then fake_quantize.
void observe_and_fake_quantize(Launcher& launcher, const Dense& x, Flag observes, Flag quantizes,
                               const ObserveBuffers& buffers, const QParamBuffers& qparams,
                               std::optional<double> averaging_constant, const QParamsConfig& config,
                               NonFinite policy, void* y, uint64_t* mask);

void mask_gradient(Launcher& launcher, const Dense& grad, const uint64_t* mask, void* out);

void learnable_fake_quantize(Launcher& launcher, const Dense& x, const Array& scale, const Array& zero_point,
                             QuantRange range, void* y);

void learnable_backward(Launcher& launcher, const Dense& x, const void* grad, const Array& scale,
                        const Array& zero_point, QuantRange range, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point);

}  // namespace fastquant::cuda
