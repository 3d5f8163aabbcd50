#include "depthwise.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../../memory.h"
#include "../arrays.h"
#include "axes.h"
#include "depthwise_kernels.h"
#include "kernels.h"
#include "packing.h"

namespace fastquant {
namespace {

// Products that a thread must have to compute for its start to pay off.
constexpr int64_t kProductsOfThread = 100000;

// From this many bytes on, tensors may lie outside the caches. Smaller ones, which the third cache holds, are
// computed up to a tenth faster without asking for memory in advance.
constexpr int64_t kLarge = 8388608;

// What rows of outputs that are computed together read and write should stay within.
constexpr int64_t kSecondCache = 262144;

// What lies behind the channels of arrays, because kernels read whole lanes.
constexpr int64_t kMargin = 16;

// Memory that is aligned to 64 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new char[size + 63]) {}
  char* get() const {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Cuts the channels into blocks of the widths that a kernel has: as wide as possible, the last ones only as
// wide as needed. Where a block would reach beyond the channels, it begins earlier, and computes some channels
// again.
std::vector<DepthwiseBlock> blocks_of(int64_t channels, int max_width) {
  std::vector<DepthwiseBlock> blocks;
  for (int64_t from = 0; from < channels;) {
    const int64_t left = channels - from;
    int width = max_width;
    while (width > 16 && (width / 2 >= left || width > channels)) width /= 2;
    const int64_t first = std::max<int64_t>(0, std::min(from, channels - width));
    blocks.push_back({first, width, static_cast<int>(std::min<int64_t>(width, channels - first))});
    from = first + width;
  }
  return blocks;
}

// One part of a convolution (axes.h) of x with as many channels as the output, as kernels take it.
class Part {
 public:
  Part(const Axes& axes, const QuantizedValues& x, const ConvShape& s, const uint8_t* packed,
       const uint8_t* padding, const OutputStage& stage)
      : z_(axes.dims[0]),
        y_(axes.dims[1]),
        x_(axes.dims[2]),
        s_(s),
        data_(x.data),
        rows_(axes.positions(s.batch)) {
    const int64_t channels = s.out_channels, width = rounded_up(channels, kLaneChannels);
    rows_ /= std::max<int64_t>(x_.count, 1);
    lines_ = static_cast<int64_t>(z_.taps.size() * y_.taps.size());
    // A kernel of one row is turned: its columns become the rows of the grid of taps (depthwise_kernels.h),
    // each of which reads a line that begins further right.
    turned_ = lines_ == 1;
    g_.rows = turned_ ? static_cast<int64_t>(x_.taps.size()) : lines_;
    g_.columns = turned_ ? 1 : static_cast<int64_t>(x_.taps.size());
    for (int64_t k = 0; k < g_.columns; ++k) {
      for (int64_t r = 0; r < g_.rows; ++r) {
        const auto index = [&](const Axis& axis, int64_t i) { return axis.taps[static_cast<size_t>(i)].index; };
        const int64_t line = turned_ ? 0 : r, y_taps = static_cast<int64_t>(y_.taps.size());
        const int64_t row = index(z_, line / y_taps) * s.kernel[1] + index(y_, line % y_taps);
        const int64_t tap = row * s.kernel[2] + index(x_, turned_ ? r : k);
        taps_.push_back(reinterpret_cast<const int8_t*>(packed) + tap * width);
      }
    }
    // Of tensors that may lie outside the caches, kernels ask for the next row in advance.
    const int64_t in = s.batch * s.in[0] * s.in[1] * s.in[2], element = bytes_of(stage.type);
    ahead_ = (in + s.positions() * element) * channels > kLarge;
    g_.stride = turned_ ? 1 : x_.stride;
    g_.dilation = turned_ ? 1 : x_.dilation();
    g_.outputs = x_.count;
    g_.output_step = x_.step * channels;
    g_.output_row = ahead_ ? y_.step * s.out[2] * channels * element : 0;
    g_.padding = padding;
    g_.taps = taps_.data();
    g_.input_flip = x.is_signed ? 0x80 : 0;
    g_.input_zero_point = static_cast<int32_t>(x.zero_point + (x.is_signed ? 128 : 0));
    g_.stage = stage;
  }
  Part(const Part&) = delete;

  int64_t rows() const { return rows_; }

  // Computes the rows [begin, end) of outputs.
  void run(int64_t begin, int64_t end, const std::vector<DepthwiseBlock>& blocks) const {
    if (begin >= end) return;
    const DepthwiseKernels& kernels = *quantized_kernels().depthwise;
    const int64_t size = kernels.prepared_size(g_), chunk = std::min(end - begin, rows_at_once());
    const Scratch prepared(size * static_cast<int64_t>(blocks.size()));
    const Scratch scratch(kernels.scratch_size(g_));
    for (size_t b = 0; b < blocks.size(); ++b)
      kernels.prepare(g_, blocks[b], prepared.get() + static_cast<int64_t>(b) * size);
    std::vector<DepthwiseLine> lines(static_cast<size_t>(chunk * g_.rows));
    std::vector<void*> outputs(static_cast<size_t>(chunk));
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t count = std::min(chunk, end - first);
      for (int64_t i = 0; i < count; ++i)
        set_row(first + i, lines.data() + i * g_.rows, &outputs[static_cast<size_t>(i)]);
      for (size_t b = 0; b < blocks.size(); ++b) {
        kernels.run(g_, blocks[b], prepared.get() + static_cast<int64_t>(b) * size, lines.data(),
                    outputs.data(), count, scratch.get());
      }
    }
  }

 private:
  // How many rows of outputs to compute of one block of channels before the next block, which is as many as
  // keep what they read in a cache: kernels may use what they interleaved for the next row, too.
  int64_t rows_at_once() const {
    const int64_t values = (y_.stride * s_.in[2] + x_.count) * s_.out_channels;
    return std::max<int64_t>(1, kSecondCache / std::max<int64_t>(1, values));
  }

  // The lines that a row of outputs reads, and where it begins.
  void set_row(int64_t row, DepthwiseLine* line, void** output) const {
    const int64_t y = row % y_.count, z = row / y_.count % z_.count, n = row / y_.count / z_.count;
    const int64_t channels = s_.out_channels;
    constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;
    for (const Axis::Tap& a : z_.taps) {
      for (const Axis::Tap& b : y_.taps) {
        const int64_t iz = z * z_.stride + a.offset, iy = y * y_.stride + b.offset;
        const bool inside = iz >= 0 && iz < z_.in && iy >= 0 && iy < y_.in;
        const bool last = b.offset + y_.stride > y_.taps.back().offset;
        const uint8_t* const first = data_ + ((n * z_.in + iz) * y_.in + iy) * x_.in * channels;
        const int64_t step = turned_ ? x_.stride : 1;
        for (int64_t k = 0; k < (turned_ ? g_.rows : 1); ++k, ++line) {
          if (!inside || x_.taps.empty()) {
            *line = {g_.padding, 0, -kFar, kFar, 0};
            continue;
          }
          const int64_t from = x_.taps[static_cast<size_t>(k)].offset;  // what the line's column 0 reads
          *line = {first + from * channels, step * channels, -floor_divided(from, step),
                   floor_divided(x_.in - 1 - from, step) + 1,
                   ahead_ && last ? y_.stride * x_.in * channels : 0};
        }
      }
    }
    const int64_t oz = z_.first + z * z_.step, oy = y_.first + y * y_.step;
    const int64_t position = ((n * s_.out[0] + oz) * s_.out[1] + oy) * s_.out[2] + x_.first;
    *output = static_cast<char*>(g_.stage.data) + position * channels * bytes_of(g_.stage.type);
  }

  const Axis &z_, &y_, &x_;
  const ConvShape& s_;
  const uint8_t* data_;
  int64_t rows_, lines_;
  bool turned_, ahead_;
  std::vector<const int8_t*> taps_;
  DepthwiseGeometry g_;
};

// Each input channel, repeated for each of its output channels.
std::unique_ptr<uint8_t[]> repeated(const uint8_t* x, int64_t values, int64_t times) {
  std::unique_ptr<uint8_t[]> copy(new uint8_t[values * times]);
  for (int64_t i = 0; i < values; ++i) std::memset(copy.get() + i * times, x[i], times);
  return copy;
}

// The parts of a convolution of x with as many channels as the output.
void convolve(const QuantizedValues& x, const ConvShape& s, const std::vector<Axes>& axes,
              const uint8_t* packed, const LayerScales& scales, const OutputFormat& format) {
  const int64_t channels = s.out_channels, width = rounded_up(channels, kLaneChannels);
  const Requantization requantization(1, channels, width + kMargin, nullptr, x.scale, x.zero_point, scales,
                                      format);
  const std::vector<uint8_t> padding(static_cast<size_t>(width), static_cast<uint8_t>(x.zero_point));
  std::vector<std::unique_ptr<const Part>> parts;
  int64_t products = 0;
  for (const Axes& a : axes) {
    parts.push_back(std::make_unique<Part>(a, x, s, packed, padding.data(), requantization.stage()));
    products += a.positions(s.batch) * a.taps() * channels;
  }
  const std::vector<DepthwiseBlock> blocks = blocks_of(channels, quantized_kernels().depthwise->max_width);
  const int64_t pieces = piece_count(products, kProductsOfThread);
  for_pieces(pieces, pieces, 1, [&](int64_t piece, int64_t, int64_t) {
    for (const auto& part : parts)
      part->run(part->rows() * piece / pieces, part->rows() * (piece + 1) / pieces, blocks);
  });
}

// The same where each channel of x has several of the output.
void convolve_repeated(const QuantizedValues& x, const ConvShape& s, const std::vector<Axes>& axes,
                       const uint8_t* packed, const LayerScales& scales, const OutputFormat& format) {
  if (s.positions() == 0) return;
  const int64_t times = s.out_channels / s.in_channels;
  if (times == 1) return convolve(x, s, axes, packed, scales, format);
  const int64_t values = s.in[0] * s.in[1] * s.in[2] * s.in_channels;
  ConvShape image = s;
  image.batch = 1;
  QuantizedValues from = x;
  OutputFormat to = format;
  for (int64_t n = 0; n < s.batch; ++n) {
    const auto copy = repeated(x.data + n * values, values, times);
    from.data = copy.get();
    convolve(from, image, axes, packed, scales, to);
    to.data = static_cast<char*>(to.data) + image.positions() * s.out_channels * bytes_of(to.type);
  }
}

}  // namespace

void depthwise_conv(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                    const LayerScales& scales, const OutputFormat& format) {
  convolve_repeated(x, shape, {axes_of(shape)}, packed, scales, format);
}

void depthwise_conv_transpose(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                              const LayerScales& scales, const OutputFormat& format) {
  convolve_repeated(x, shape, axes_of_transposed(shape), packed, scales, format);
}

}  // namespace fastquant
