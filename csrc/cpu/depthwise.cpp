#include "depthwise.h"

#include <memory>

#include "widened.h"

namespace fastquant {
namespace {

const PlaneKernels<float>& plane_kernels(float) { return kernels().depthwise; }
const PlaneKernels<BFloat16>& plane_kernels(BFloat16) { return kernels().depthwise_bf16; }

// A plane of a layer, with the masks for one direction.
class Plane : public DepthwisePlane {
 public:
  Plane(const DepthwiseLayer& layer, bool backward)
      : DepthwisePlane{layer.kernel, layer.stride,    layer.height, layer.width,
                       layer.rows(), layer.columns(), nullptr},
        words_(lane_groups() * mask_words(), kAllLanes) {
    for (int k = 0; k < kernel; ++k) {
      mask_rows(1 + k, positions(k, height, rows, backward));
      mask_columns(1 + kernel + k, positions(k, width, columns, backward));
    }
    const auto are_full = [](const uint16_t* begin, const uint16_t* end) {
      return std::all_of(begin, end, [](uint16_t m) { return m == kAllLanes; });
    };
    for (uint16_t *group = words_.data(), *end = group + words_.size(); group != end; group += mask_words()) {
      const uint16_t *const of_rows = group + 1, *const of_columns = of_rows + kernel;
      const bool in_rows = are_full(of_rows, of_columns),
                 in_columns = are_full(of_columns, of_columns + kernel);
      *group = static_cast<uint16_t>(!in_rows ? Edges::both : in_columns ? Edges::none : Edges::columns);
    }
    masks = words_.data();
  }

 private:
  static constexpr uint16_t kAllLanes = 0xffff;
  struct Positions {
    int64_t begin, end;
  };

  // The rows, or columns, at which tap k lies inside a plane with `size` of them. Backward, positions are those
  // of the tap's phase; these must exist, and the tap's result must lie inside the output.
  Positions positions(int k, int64_t size, int64_t outputs, bool backward) const {
    const auto taps = static_cast<int>(kernel), step = static_cast<int>(stride);
    const int64_t phase = tap_phase(k, taps, step), shift = tap_shift(k, taps, step);
    const int64_t of_phase = (size - phase + stride - 1) / stride;
    const int64_t begin = std::min(std::max<int64_t>(0, backward ? shift : -shift), outputs);
    const int64_t end = backward ? std::min(outputs + shift, of_phase) : std::min(outputs, of_phase - shift);
    return {begin, std::clamp(end, begin, outputs)};
  }

  // Leaves out the positions [begin, end).
  void leave_out(int64_t word, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      words_[i / kTapLanes * mask_words() + word] &= static_cast<uint16_t>(~(1u << i % kTapLanes));
    }
  }

  void mask_rows(int64_t word, Positions inside) {
    leave_out(word, 0, inside.begin * columns);
    leave_out(word, inside.end * columns, lane_groups() * kTapLanes);
  }

  void mask_columns(int64_t word, Positions inside) {
    for (int64_t r = 0; r < rows; ++r) {
      leave_out(word, r * columns, r * columns + inside.begin);
      leave_out(word, r * columns + inside.end, (r + 1) * columns);
    }
  }

  std::vector<uint16_t> words_;
};

}  // namespace

template <class S>
void depthwise_convolution(const DepthwiseLayer& layer, const S* x, const S* weight, const S* bias, S* y) {
  const Plane plane(layer, false);
  const int64_t planes = layer.images * layer.channels, taps = layer.kernel * layer.kernel;
  const Widened weights(weight, layer.channels * taps), biases(bias, layer.channels);
  const int64_t pieces = std::min(piece_count(planes * plane.inputs()), planes);
  for_pieces(planes, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> scratch(plane.scratch());
    while (begin < end) {
      const int64_t channel = begin % layer.channels, count = std::min(layer.channels - channel, end - begin);
      plane_kernels(S()).forward(plane, count, x + begin * plane.inputs(), weights.data() + channel * taps,
                                 bias == nullptr ? nullptr : biases.data() + channel,
                                 y + begin * plane.outputs(), scratch.data());
      begin += count;
    }
  });
}

template <class S>
void depthwise_convolution_backward(const DepthwiseLayer& layer, const S* grad, const S* x, const S* weight,
                                    S* grad_x, S* grad_weight) {
  const Plane plane(layer, true);
  const int64_t channels = layer.channels, taps = layer.kernel * layer.kernel;
  const int64_t pieces = std::min(piece_count(layer.images * channels * plane.inputs()), channels);
  // Memory is allocated before any of it is written to: the caller may compute otherwise what this throws at,
  // but only while grad is as it was.
  const Widened weights(weight, channels * taps);
  std::vector<double> sums(grad_weight == nullptr ? 0 : channels * taps);
  const std::unique_ptr<float[]> scratch(new float[pieces * plane.scratch()]);
  // Each thread has some channels of every image, and sums up the gradients of their weights.
  for_pieces(channels, pieces, 1, [&](int64_t piece, int64_t begin, int64_t end) {
    if (begin == end) return;
    for (int64_t image = 0; image < layer.images; ++image) {
      const int64_t first = image * channels + begin, input = first * plane.inputs();
      plane_kernels(S()).backward(plane, end - begin, grad + first * plane.outputs(), x + input,
                                  weights.data() + begin * taps, grad_x == nullptr ? nullptr : grad_x + input,
                                  grad_weight == nullptr ? nullptr : sums.data() + begin * taps,
                                  scratch.get() + piece * plane.scratch());
    }
  });
  for (size_t i = 0; i < sums.size(); ++i) from_compute(grad_weight + i, static_cast<float>(sums[i]));
}

template void depthwise_convolution(const DepthwiseLayer&, const float*, const float*, const float*, float*);
template void depthwise_convolution(const DepthwiseLayer&, const BFloat16*, const BFloat16*, const BFloat16*,
                                    BFloat16*);
template void depthwise_convolution_backward(const DepthwiseLayer&, const float*, const float*, const float*,
                                             float*, float*);
template void depthwise_convolution_backward(const DepthwiseLayer&, const BFloat16*, const BFloat16*,
                                             const BFloat16*, BFloat16*, BFloat16*);

}  // namespace fastquant
