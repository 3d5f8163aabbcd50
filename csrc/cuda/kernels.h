// The GPU implementations of the ops, on plain device memory. Each function launches kernels on a stream
// and returns without waiting for them, except under NonFinite::raise. Like the functions in csrc/cpu, they
// do not depend on torch, and they give the same results; ops.cpp calls them with tensors.
#pragma once

#include <cuda_runtime_api.h>

#include "../settings.h"

namespace fastquant::cuda {

// Throws if a call to the CUDA runtime failed. If these kernels cannot run on this GPU or driver, where
// torch's own may still run, the message names the environment variable that disables them.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next check does not report it again
  const bool runs_here = error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&
                         error != cudaErrorUnsupportedPtxVersion && error != cudaErrorInsufficientDriver;
  check(false, "CUDA: ", cudaGetErrorString(error),
        runs_here ? "" : "; the environment variable FASTQUANT_CUDA_KERNELS=0 has plain torch ops do the work");
}

// The stream on which an op launches its kernels, and temporary memory for them. Kernels of other ops on
// the same stream run before or after all kernels of the op, never between them.
class Launcher {
 public:
  Launcher(cudaStream_t stream, int multiprocessors) : stream_(stream), multiprocessors_(multiprocessors) {}
  virtual ~Launcher() = default;
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  // Uninitialized device memory, aligned to 256 bytes, which is valid until the op's last kernel ends.
  virtual void* scratch(size_t bytes) = 0;
  // Counters with which a kernel finds out which of its blocks finishes last (arrives_last in device.cuh).
  // They are zero, and a kernel must leave them at zero. Call this once for each kernel.
  virtual unsigned* tickets(int64_t count) = 0;
  // Whether the stream is capturing a CUDA graph, so that the host must not wait for it.
  virtual bool is_capturing() const = 0;

 private:
  cudaStream_t stream_;
  int multiprocessors_;
};

// The most tickets that a kernel may ask for.
constexpr int64_t kMaxTickets = 4096;

// A flag in device memory: an integer of 1, 2, 4 or 8 bytes, where zero means off. If data is null, it is on.
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

// Under NonFinite::propagate, a NaN makes the range NaN. On a CPU it raises an error, as torch does, which
// is not possible here without waiting for the device.
void observe_histogram(Launcher& launcher, const Dense& x, const Array& histogram,
                       const ObserveBuffers& buffers, int64_t upsample_rate, NonFinite policy, int64_t times);

void choose_qparams(Launcher& launcher, const Array& min_val, const Array& max_val,
                    const QParamBuffers& qparams, const QParamsConfig& config);

void search_histogram_range(Launcher& launcher, const Array& histogram, const Array& min_val,
                            const Array& max_val, int64_t levels, const Array& new_min, const Array& new_max);

// mask may be null. If `enabled` is off, x is copied to y and every bit of the mask is set.
void fake_quantize(Launcher& launcher, const Dense& x, Flag enabled, const Array& scale,
                   const Array& zero_point, QuantRange range, void* y, uint64_t* mask);

// Quantizes to int8 with one scale per channel and zero points of zero.
void quantize_per_channel(Launcher& launcher, const Dense& x, const Array& scale, QuantRange range,
                          int8_t* out);

// observe_qparams, then fake_quantize.
void observe_and_fake_quantize(Launcher& launcher, const Dense& x, Flag observes, Flag quantizes,
                               const ObserveBuffers& buffers, const QParamBuffers& qparams,
                               std::optional<double> averaging_constant, const QParamsConfig& config,
                               NonFinite policy, void* y, uint64_t* mask);

// The same for the clamped sum of two tensors.
void add_observe_and_fake_quantize(Launcher& launcher, const SumOfTensors& x, Flag observes, Flag quantizes,
                                   const ObserveBuffers& buffers, const QParamBuffers& qparams,
                                   std::optional<double> averaging_constant, const QParamsConfig& config,
                                   NonFinite policy, void* y, uint64_t* mask);

struct BatchNormBuffers {
  Array weight, bias, running_mean, running_var;
};

struct BatchNormConfig {
  bool training;
  double momentum, eps;
  double low, high;  // of the activation
};

// Batch norm's statistics, and observe_qparams per tensor for what batch_norm_fake_quantize quantizes. Channels
// that have infinities, NaN, or elements whose statistics overflow are read once more, by one block.
void observe_batch_norm(Launcher& launcher, const Dense& x, const BatchNormBuffers& buffers,
                        const BatchNormConfig& config, Flag observes, Flag quantizes,
                        const ObserveBuffers& observed, const QParamBuffers& qparams,
                        const ObserveSettings& settings, void* norm, double* quantizer);

struct BatchNormValues {
  bool training;
  double low, high;
  QuantRange range;
};

void batch_norm_fake_quantize(Launcher& launcher, const Dense& x, const Array& norm, const Array& quantizer,
                              const BatchNormValues& config, void* y);

void batch_norm_backward(Launcher& launcher, const Dense& x, const void* grad, const Array& norm,
                         const Array& quantizer, const BatchNormValues& config, void* grad_x,
                         const Array& grad_weight, const Array& grad_bias);

// A Dense weight is viewed with its output channels, the first axis, as channels.
void observe_folded_weight(Launcher& launcher, const Dense& weight, const Array& bn_weight, const Array& bn_std,
                           Flag observes, Flag quantizes, const ObserveBuffers& buffers,
                           const QParamBuffers& qparams, const ObserveSettings& settings, void* folded,
                           const Array& fold);

void fold_weight(Launcher& launcher, const Dense& weight, const Array& fold, QuantRange range, void* folded);

void fold_weight_backward(Launcher& launcher, const Dense& weight, const void* grad, const Array& fold,
                          QuantRange range, void* grad_weight, const Array& grad_bn_weight);

void mask_gradient(Launcher& launcher, const Dense& grad, const uint64_t* mask, void* out);

void learnable_fake_quantize(Launcher& launcher, const Dense& x, const Array& scale, const Array& zero_point,
                             QuantRange range, void* y);

void learnable_backward(Launcher& launcher, const Dense& x, const void* grad, const Array& scale,
                        const Array& zero_point, QuantRange range, double grad_factor, void* grad_x,
                        const Array& grad_scale, const Array& grad_zero_point);

}  // namespace fastquant::cuda
