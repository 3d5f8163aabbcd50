// The table of kernels: plain functions over raw memory, one table for each instruction
// set. Every kernel is single-threaded and works on memory without gaps; layout, threading
// and what a tensor is are the callers' business.
#pragma once

#include <cstdint>

#include "../math/range.h"

namespace fastquant {

// What FakeQuantizer or ExactQuantizer (math/fake_quantize.h) are made of, one array each. T is the type
// of the arithmetic.
//
// Rows: memory is a sequence of rows of `inner` elements, and row r belongs to channel
// r % channels. Periodic: element i has the parameters at i % period; each array then
// holds kPeriodPadding more entries that repeat its beginning.
constexpr int64_t kPeriodPadding = 64;

template <class T>
struct QuantParams {
  const T* scale;
  const T* inverse_scale;
  const T* zero_point;
  const T* low;
  const T* high;
  const T* low_edge;
  const T* high_edge;
  int64_t inner;     // rows
  int64_t channels;  // rows
  int64_t period;    // periodic
  int64_t quant_min;
  int64_t quant_max;
  bool float_zero_point;
  bool exact;  // ExactQuantizer
};

// The gradients of a learnable scale and zero point, summed over some elements.
struct LearnableSums {
  double scale;
  double zero_point;
};

template <class S, class T>
struct KernelsFor {
  // Smallest and largest of n elements, NaN left out (+inf, -inf where nothing is left).
  // *nonfinite: whether there was a NaN or an infinity.
  void (*minmax)(const S* x, int64_t n, T* low, T* high, bool* nonfinite);

  // The same without infinities too; *nonfinite is how many elements were left out.
  void (*minmax_finite)(const S* x, int64_t n, T* low, T* high, int64_t* nonfinite);

  // Folds each column of a rows × columns block into low[column], high[column]; successive
  // rows lie row_stride elements apart.
  void (*minmax_columns)(const S* x, int64_t rows, int64_t columns, int64_t row_stride, T* low, T* high,
                         bool* nonfinite);

  // Counts elements of [low, high] in `bins` equal bins, the last one closed; all others in the
  // entry after the last bin. Adds to `tables` tables of counts (1 or 4) that the caller sums: successive
  // increments of one counter would wait for each other. Each has histogram_stride(bins)
  // entries. Needs low < high and a finite (high - low) * bins.
  void (*histogram)(const S* x, int64_t n, T low, T high, int64_t bins, uint32_t* counts, int tables);

  // parts[b] = Resampling<T>(from, to, bins, upsample_rate).parts_before(b + 1) (math/histogram.h), for all
  // bins. A kernel because it is made of fused multiply-adds, which are calls to the library elsewhere.
  void (*parts_before)(const Range<double>& from, const Range<double>& to, int64_t bins, int64_t upsample_rate,
                       int64_t* parts);

  // y = fake-quantized x for the elements [begin, end), begin a multiple of 64. Where mask
  // is not null, its bit i says whether element i was in the quantized range.
  void (*fake_quantize_rows)(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                             const QuantParams<T>& params);
  void (*fake_quantize_periodic)(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                                 const QuantParams<T>& params);

  // out = grad where the mask has a bit, zero elsewhere; begin a multiple of 64.
  void (*mask_gradient)(const S* grad, const uint64_t* mask, S* out, int64_t begin, int64_t end);

  // Gradients of learnable fake-quantize for n elements of one channel.
  LearnableSums (*learnable_backward)(const S* grad, const S* x, S* grad_x, int64_t n, T scale, T inverse_scale,
                                      T zero_point, T quant_min, T quant_max, T grad_factor);
};

struct Kernels {
  const char* isa;
  KernelsFor<float, float> f32;
  KernelsFor<double, double> f64;
  KernelsFor<Half, float> f16;
  KernelsFor<BFloat16, float> bf16;

  // Sum over a histogram's bins of the squared error that quantizing bins
  // [start_bin, end_bin] to `levels` values makes, in units of counts × value². density: the
  // counts by the width of a bin, in float.
  double (*quantization_error)(const float* density, int64_t bins, double bin_width, int64_t start_bin,
                               int64_t end_bin, double levels, float* scratch);

  // out = quantized_to_int8(x) (math/fake_quantize.h).
  void (*quantize)(const float* x, int8_t* out, int64_t n, float inverse_scale, float low, float high);
};

// Entries of one table of counts: the bins, and that of the elements outside.
constexpr int64_t histogram_stride(int64_t bins) { return (bins + 1 + 15) / 16 * 16; }

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

}  // namespace fastquant
