// The table of CPU kernels, of which there is one for each instruction set. Kernels are plain functions on
// contiguous memory and run on one thread; callers deal with tensors, their layout, and threads.
#pragma once

#include <cstdint>

#include "../math/batch_norm.h"
#include "../math/folded_weight.h"
#include "../math/range.h"

namespace fastquant {

// Arrays of the parameters of FakeQuantizer or ExactQuantizer (math/fake_quantize.h). T is the type of the
// arithmetic. There are two layouts:
//
// Rows: x is a sequence of rows of `inner` elements. Row r belongs to channel r % channels, and arrays are
// indexed by channel. Periodic: element i uses entry i % period. Each array then has kPeriodPadding more
// entries, which repeat its beginning, so that a vector load never has to wrap around.
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
  int64_t inner;     // rows only
  int64_t channels;  // rows only
  int64_t period;    // periodic only
  int64_t quant_min;
  int64_t quant_max;
  bool float_zero_point;
  bool exact;  // use ExactQuantizer
};

// Two tensors of one layout, and the bounds of their sum, NaN where there is none (ClampedSum in
// math/clamped_sum.h).
template <class S, class T>
struct Summands {
  const S* a;
  const S* b;
  T low, high;
};

// The gradients of a learnable scale and zero point, summed over some elements.
struct LearnableSums {
  double scale;
  double zero_point;
};

// The elements of one channel that a batch norm kernel takes at once: rows of `length` elements, `stride`
// elements apart. A chunk is a row of at most kLongestChunk elements, or several rows of at most kMostGathered
// elements in all, which kernels may copy. The chunk that comes next lies `ahead` bytes further on, and is
// fetched meanwhile: it is long enough to cover the latency of memory, and stays in the L1 cache.
constexpr int64_t kLongestChunk = 4096, kMostGathered = 2048;

struct ChannelChunk {
  int64_t rows, length, stride, ahead;
};

// The mean of some elements, the sum of their squared distances from it, and the extremes. `finite` says
// whether all of them are; if not, only the mean has a meaning, that of a plain sum.
struct ChunkMoments {
  double mean, squares, low, high;
  bool finite;
};

struct GradientSums {
  double of_bias, of_gain;
};

// ChannelNorm and GradientMeans (math/batch_norm.h) of each column of a matrix. `offset` and `slope` are null
// where the statistics do not depend on x.
template <class T>
struct NormColumns {
  const T *mean, *gain, *bias, *offset, *slope;
  bool ordinary;  // is_ordinary, for all of them
};

// Memory that kernels of columns need for accumulators in whole vectors.
constexpr int64_t column_scratch(int64_t columns) { return 5 * (columns + 64); }

// Weights of type S that are folded with batch norm, and gradients of type F of the folded ones.
template <class S, class F, class T>
struct FoldKernels {
  // Folds n weights of one channel, whose s is not 0 (math/folded_weight.h).
  void (*forward)(const S* weight, F* folded, int64_t n, const ChannelFold<T>& fold, int64_t quant_min,
                  int64_t quant_max);

  // The gradient of these weights. Returns their part of the gradient of s, times s. grad_weight may be grad.
  double (*backward)(const F* grad, const S* weight, S* grad_weight, int64_t n, const ChannelFold<T>& fold,
                     int64_t quant_min, int64_t quant_max);
};

// Pointwise convolutions (csrc/cpu/pointwise.h) work on units of so many neighbouring positions. The positions
// of an image that are left over by whole units share a unit with those of other images.
constexpr int64_t kPositionUnit = 16;

struct PositionUnits {
  int64_t in_image;          // whole units
  int64_t in_images;         // whole units, of all images
  int64_t left;              // positions of each image
  int64_t images_of_shared;  // that share a unit
  int64_t shared;            // units that images share; they follow the whole ones
};

// y[n, o, p] = bias[o] + the sum over i of weight[o, i] x[n, i, p]; or, if `adds`, that sum is added to y.
// `bias` may be null. weight[o, i] lies at weight + o * weight_outer_stride + i * weight_inner_stride; one of
// these strides is 1. Sums are fp32.
template <class S>
struct PointwiseProduct {
  const S* x;
  const float* weight;
  const float* bias;
  S* y;
  int64_t images, inner, outer, positions;
  int64_t weight_outer_stride, weight_inner_stride;
  bool adds;
  PositionUnits units;
  int64_t units_at_once;  // whose inputs stay in the second cache
};

template <class S>
struct PointwiseKernels {
  // The rows [first, last) of y in the units [begin, end). `scratch` has room for `units_at_once` units of x,
  // or for all that images share.
  void (*product)(const PointwiseProduct<S>& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                  S* scratch);

  // sums[r, c, i] += the products of a[r, j] and b[c, j] for all j that leave the remainder i when divided by
  // kPositionUnit. The rows of a and b begin `stride` elements apart. `columns` is a multiple of kPositionUnit.
  void (*dots)(const S* a, int64_t a_rows, const S* b, int64_t b_rows, int64_t stride, int64_t columns,
               float* sums);

  // y[c, r] = x[r, c]. Rows of y begin y_stride elements apart.
  void (*transpose)(const S* x, int64_t rows, int64_t columns, float* y, int64_t y_stride);

  // y = x
  void (*widen)(const S* x, int64_t n, float* y);
};

template <class S, class T>
struct KernelsFor {
  // The smallest and largest of n elements other than NaN; +inf and -inf if there are none. *nonfinite is set
  // to whether any element is NaN or infinite.
  void (*minmax)(const S* x, int64_t n, T* low, T* high, bool* nonfinite);

  // The same for finite elements only. *nonfinite is set to the number of other elements.
  void (*minmax_finite)(const S* x, int64_t n, T* low, T* high, int64_t* nonfinite);

  // Updates low[c] and high[c] with the elements of column c of a matrix, whose rows begin row_stride elements
  // apart.
  void (*minmax_columns)(const S* x, int64_t rows, int64_t columns, int64_t row_stride, T* low, T* high,
                         bool* nonfinite);

  // Counts the elements in [low, high] in `bins` bins of equal width, of which the last includes `high`. All
  // other elements are counted in the entry after the last bin. The counts are spread over `tables` tables (1
  // or 4) of histogram_stride(bins) entries each, which the caller sums: with one table, successive increments
  // of the same counter would wait for each other. Requires low < high and a finite (high - low) * bins.
  void (*histogram)(const S* x, int64_t n, T low, T high, int64_t bins, uint32_t* counts, int tables);

  // parts[b] = Resampling<T>(from, to, bins, upsample_rate).parts_before(b + 1) (math/histogram.h), for all
  // bins. This is a kernel because it uses fused multiply-adds, which code for the baseline processor can only
  // do by calling a library function.
  void (*parts_before)(const Range<double>& from, const Range<double>& to, int64_t bins, int64_t upsample_rate,
                       int64_t* parts);

  // Writes fake-quantized x to y for the elements [begin, end); `begin` is a multiple of 64. If mask is not
  // null, its bit i is set if element i was in the quantized range.
  void (*fake_quantize_rows)(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                             const QuantParams<T>& params);
  void (*fake_quantize_periodic)(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                                 const QuantParams<T>& params);

  // The same as minmax for the elements [begin, end) of the sum, neither rounded to S nor clamped.
  void (*minmax_of_sum)(const Summands<S, T>& x, int64_t begin, int64_t end, T* low, T* high, bool* nonfinite);

  // The same as minmax_finite for the elements [begin, end) of the clamped sum.
  void (*minmax_finite_of_clamped_sum)(const Summands<S, T>& x, int64_t begin, int64_t end, T* low, T* high,
                                       int64_t* nonfinite);

  // The same as fake_quantize_rows for the clamped sum, with one channel. The mask's bit is not set either
  // where the sum was clamped or lies on a bound.
  void (*fake_quantize_clamped_sum)(const Summands<S, T>& x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                                    const QuantParams<T>& params);

  // The same without fake-quantizing.
  void (*clamped_sum)(const Summands<S, T>& x, S* y, uint64_t* mask, int64_t begin, int64_t end);

  // out = grad times the mask's bit (0 or 1), for the elements [begin, end); `begin` is a multiple of 64.
  void (*mask_gradient)(const S* grad, const uint64_t* mask, S* out, int64_t begin, int64_t end);

  // Gradients of learnable fake-quantize for n elements of one channel.
  LearnableSums (*learnable_backward)(const S* grad, const S* x, S* grad_x, int64_t n, T scale, T inverse_scale,
                                      T zero_point, T quant_min, T quant_max, T grad_factor);

  FoldKernels<S, S, T> fold;

  // Batch norm, a clamp and fake-quantize (math/batch_norm.h), for elements of one channel …
  void (*moments_of_rows)(const S* x, const ChannelChunk& chunk, ChunkMoments* out);
  void (*normalize_rows)(const S* x, S* y, const ChannelChunk& chunk, const ChannelNorm<T>& norm,
                         const Activation<T>& activation);
  // Adds to the sums of the gradients that pass, and of these times x - mean.
  void (*gradient_sums_of_rows)(const S* grad, const S* x, const ChannelChunk& chunk,
                                const ChannelNorm<T>& norm, const Range<T>& passing, GradientSums* out);
  // means: null where the statistics do not depend on x.
  void (*gradient_of_rows)(const S* grad, const S* x, S* grad_x, const ChannelChunk& chunk,
                           const ChannelNorm<T>& norm, const Range<T>& passing, const GradientMeans<T>* means);

  // … and for a contiguous matrix with one column per channel. scratch has column_scratch(columns) elements,
  // totals two for each column.
  void (*moments_of_columns)(const S* x, int64_t rows, int64_t columns, T* scratch, double* totals,
                             ChunkMoments* out);
  void (*normalize_columns)(const S* x, S* y, int64_t rows, int64_t columns, const NormColumns<T>& norm,
                            const Activation<T>& activation);
  void (*gradient_sums_of_columns)(const S* grad, const S* x, int64_t rows, int64_t columns,
                                   const NormColumns<T>& norm, const Range<T>& passing, T* scratch,
                                   double* of_bias, double* of_gain);
  void (*gradient_of_columns)(const S* grad, const S* x, S* grad_x, int64_t rows, int64_t columns,
                              const NormColumns<T>& norm, const Range<T>& passing);
};

// A linear layer, all of whose tensors are contiguous: x is [rows, inputs], and y [rows, outputs]. The weight
// is packed in panels of outputs: [outputs / kHalfPanel, rounded up][inputs][kHalfPanel]
// (python/fastquant/_native/ half_weights.py). bias may be null.
constexpr int64_t kHalfPanel = 16;
struct HalfLinear {
  const float* x;
  const Half* weight;
  const float* bias;
  bool relu;
  float* y;
  int64_t rows, inputs, outputs;
};

// A depthwise convolution. The kernel of each channel is square, of 3, 5 or 7 taps a side, and reaches as far
// beyond each edge of a plane (one channel of one image) as it reaches from its middle.
//
// With a stride of s, a plane consists of s x s phases, each of every s-th element of every s-th row. A phase
// has the rows and columns of the output (the last may be missing). So a tap is at a constant distance in
// memory from a position of the output, in a phase that depends on the tap alone, and whole vectors of
// positions are computed across the ends of rows. Masks leave out the taps that lie beyond an edge.
constexpr int kTapLanes = 16;  // positions that masks are for, on every instruction set

// Tap k of a row or column: element tap_shift + i of phase tap_phase, for position i of the output.
constexpr int tap_phase(int k, int kernel, int stride) { return stride == 1 ? 0 : (k + kernel / 2) % 2; }
constexpr int tap_shift(int k, int kernel, int stride) {
  return (k - kernel / 2 - tap_phase(k, kernel, stride)) / stride;
}

// The edges of a plane beyond which taps lie, for some of kTapLanes positions.
enum class Edges : uint16_t { both, columns, none };

struct DepthwisePlane {
  int64_t kernel, stride, height, width;
  int64_t rows, columns;  // of the output, and of a phase
  // Of each kTapLanes positions (forward of the output, backward of a phase): the edges; then, for each row of
  // taps, and for each column of them, a bit for each position, which says whether they lie inside the plane.
  const uint16_t* masks;

  int64_t inputs() const { return height * width; }
  int64_t outputs() const { return rows * columns; }
  int64_t lane_groups() const { return (outputs() + kTapLanes - 1) / kTapLanes; }
  int64_t mask_words() const { return 1 + 2 * kernel; }

  // Small planes are taken several at once: what has just been stored in scratch cannot be loaded at once.
  int64_t at_once() const { return inputs() < 4096 ? 4096 / inputs() : 1; }
  // In scratch, each phase of these planes has memory around it, which vectors of taps beyond an edge read.
  int64_t margin() const { return kernel / 2 * (columns + 1); }
  int64_t phase_stride() const { return 2 * margin() + at_once() * outputs() + 2 * kTapLanes; }
  int64_t scratch() const { return (1 + stride * stride) * phase_stride(); }
};

// For planes of successive channels. weight and bias are those of the first of them.
template <class S>
struct PlaneKernels {
  // bias may be null.
  void (*forward)(const DepthwisePlane& plane, int64_t planes, const S* x, const float* weight,
                  const float* bias, S* y, float* scratch);

  // Writes the gradient of x to grad_x, which may be grad, and adds that of the weight to grad_weight; either
  // may be null.
  void (*backward)(const DepthwisePlane& plane, int64_t planes, const S* grad, const S* x, const float* weight,
                   S* grad_x, double* grad_weight, float* scratch);
};

// Convolutions by Winograd's F(2x2, 3x3) (csrc/cpu/winograd.h). A tile of 2 x 2 outputs is transformed into,
// and from, kWinogradProducts numbers for each channel, which are so many matrices over tiles and channels.
// Those of outputs, and of the inputs that they are multiplied with, are cut into panels of kWinogradPanel
// channels.
constexpr int64_t kWinogradProducts = 16, kWinogradPanel = 2 * kPositionUnit;

// weight[o, i] are 9 taps that lie at weight + o * output_stride + i * input_stride; memory ends at `end`.
struct WinogradWeights {
  const float *weight, *end;
  int64_t outputs, inputs, output_stride, input_stride;
  bool turned;  // by 180 degrees
};

// `apart`: the distance between matrices. Numbers of channels are multiples of kPositionUnit.
struct WinogradKernels {
  // The 4 x 4 pixels that a tile depends on. Channel c of a matrix lies at
  // to + c / kWinogradPanel * panel_stride + c % kWinogradPanel.
  void (*input)(const float* const* pixels, int64_t channels, float* to, int64_t apart, int64_t panel_stride);

  // The gradients of 2 x 2 pixels, for the gradient of the weight.
  void (*gradient)(const float* const* pixels, int64_t channels, float* to, int64_t apart);

  // Writes the 2 x 2 pixels of a tile. `bias` may be null. Returns whether all that it wrote are finite.
  bool (*output)(const float* from, int64_t apart, int64_t channels, const float* bias, float* const* pixels);

  // The panel of outputs that begins with `first`: [kWinogradProducts][inputs][kWinogradPanel].
  void (*weights)(const WinogradWeights& w, int64_t first, float* to);

  // The gradients of 9 taps of kPositionUnit inputs, [kPositionUnit][9], from sums that are in `parts` parts. 7
  // more elements may be written. Returns whether all are finite.
  bool (*weight_gradient)(const float* sums, int64_t apart, int64_t parts, int64_t part_stride, float* to);

  // y[c, r] = x[r, c]
  void (*transpose)(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y,
                    int64_t y_stride);
};

struct Kernels {
  const char* isa;
  KernelsFor<float, float> f32;
  KernelsFor<double, double> f64;
  KernelsFor<Half, float> f16;
  KernelsFor<BFloat16, float> bf16;

  // Folded weights in the type that autocast gives them.
  FoldKernels<float, Half, float> fold_to_f16;
  FoldKernels<float, BFloat16, float> fold_to_bf16;

  // The sum over all bins of the squared error from quantizing the range of bins [start_bin, end_bin] to
  // `levels` values. density[b] is the count of bin b divided by the width of a bin.
  double (*quantization_error)(const float* density, int64_t bins, double bin_width, int64_t start_bin,
                               int64_t end_bin, double levels, float* scratch);

  // The sums over n elements of reference^2, error^2 and reference * error, where error = x - reference.
  void (*error_sums)(const float* reference, const float* x, int64_t n, double* sums);

  // Sets used[q - quant_min] to 1 for each integer q that an element is quantized to, and the entry after the
  // last where one is not finite. Returns how many finite elements are beyond the range. Not for params.exact.
  int64_t (*mark_integers)(const float* x, int64_t n, const QuantParams<float>& params, uint8_t* used);

  // out = quantized_to_int8(x) (math/fake_quantize.h).
  void (*quantize)(const float* x, int8_t* out, int64_t n, float inverse_scale, float low, float high);

  // The outputs [first, last) of the rows [begin, end), computed in fp32. Both are where panels begin, or
  // `last` is the last output.
  void (*half_linear)(const HalfLinear& layer, int64_t begin, int64_t end, int64_t first, int64_t last);

  PlaneKernels<float> depthwise;
  PlaneKernels<BFloat16> depthwise_bf16;
  PointwiseKernels<float> pointwise_f32;
  PointwiseKernels<BFloat16> pointwise_bf16;
  WinogradKernels winograd;

  // totals[k] = the sum of sums[k, i] over i.
  void (*sum_units)(const float* sums, int64_t count, float* totals);
};

// The number of entries in one table of counts: the bins, one for elements outside the range, and padding.
constexpr int64_t histogram_stride(int64_t bins) { return (bins + 1 + 15) / 16 * 16; }

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

}  // namespace fastquant
