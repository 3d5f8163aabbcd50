// Walks over the rows of depthwise convolutions.
#include "depthwise.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../../memory.h"
#include "../arrays.h"
#include "depthwise_kernels.h"
#include "kernels.h"
#include "packing.h"

namespace fastquant {
namespace {

// Products that a thread must have to compute for its start to pay off.
constexpr int64_t kProductsOfThread = 100000;

// From this many bytes on, tensors may not be in the second cache.
constexpr int64_t kLarge = 1048576;

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

// How many rows of outputs to compute of one block of channels before the next block: as many as keep what they
// read in the first cache.
int64_t rows_at_once(int64_t row_bytes) {
  return std::max<int64_t>(1, 24576 / std::max<int64_t>(1, row_bytes));
}

// The grid of taps of a kernel (depthwise_kernels.h). A kernel that has one row only is turned: its columns
// become the rows, each of which reads a line that begins further right.
struct Grid {
  bool turned;
  int64_t rows, columns;
};

Grid grid_of(const ConvShape& s) {
  const int64_t rows = s.kernel[0] * s.kernel[1];
  if (rows == 1) return {true, s.kernel[2], 1};
  return {false, rows, s.kernel[2]};
}

int64_t floor_divided(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The lines that row (z, y) of image n's outputs reads.
void set_lines(const ConvShape& s, const Grid& grid, const uint8_t* x, const uint8_t* padding, int64_t row,
               int64_t channels, bool large, DepthwiseLine* line) {
  const int64_t y = row % s.out[1], z = row / s.out[1] % s.out[0], n = row / s.out[1] / s.out[0];
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;
  for (int64_t a = 0; a < s.kernel[0]; ++a) {
    for (int64_t b = 0; b < s.kernel[1]; ++b) {
      const int64_t iz = z * s.stride[0] - s.padding[0] + a * s.dilation[0];
      const int64_t iy = y * s.stride[1] - s.padding[1] + b * s.dilation[1];
      const bool inside = iz >= 0 && iz < s.in[0] && iy >= 0 && iy < s.in[1];
      const uint8_t* const first = x + ((n * s.in[0] + iz) * s.in[1] + iy) * s.in[2] * channels;
      for (int64_t k = 0; k < (grid.turned ? grid.rows : 1); ++k, ++line) {
        if (!inside) {
          *line = {padding, 0, -kFar, kFar, 0};
          continue;
        }
        const int64_t from = k * s.dilation[2] - s.padding[2];  // the input column of the line's column 0
        const int64_t step = grid.turned ? s.stride[2] : 1;
        *line = {first + from * channels, step * channels, -floor_divided(from, step),
                 floor_divided(s.in[2] - 1 - from, step) + 1,
                 large && b + s.stride[1] >= s.kernel[1] ? s.stride[1] * s.in[2] * channels : 0};
      }
    }
  }
}

// Each input channel, repeated for each of its output channels.
std::unique_ptr<uint8_t[]> repeated(const uint8_t* x, int64_t values, int64_t times) {
  std::unique_ptr<uint8_t[]> copy(new uint8_t[values * times]);
  for (int64_t i = 0; i < values; ++i) std::memset(copy.get() + i * times, x[i], times);
  return copy;
}

// The convolution of x with as many channels as the output.
void convolve(const QuantizedValues& x, const ConvShape& s, const uint8_t* packed, const LayerScales& scales,
              const OutputFormat& format) {
  const DepthwiseKernels& kernels = *quantized_kernels().depthwise;
  const int64_t channels = s.out_channels, width = rounded_up(channels, kLaneChannels);
  const Grid grid = grid_of(s);
  const Requantization requantization(1, channels, width + kMargin, nullptr, x.scale, x.zero_point, scales,
                                      format);
  std::vector<const int8_t*> taps;
  for (int64_t k = 0; k < grid.columns; ++k) {
    for (int64_t r = 0; r < grid.rows; ++r) {
      const int64_t tap = r * grid.columns + k;
      taps.push_back(reinterpret_cast<const int8_t*>(packed) + tap * width);
    }
  }
  const std::vector<uint8_t> padding(static_cast<size_t>(width), static_cast<uint8_t>(x.zero_point));
  const bool large = (s.batch * s.in[0] * s.in[1] * s.in[2] + s.positions()) * channels > kLarge;
  DepthwiseGeometry g;
  g.rows = grid.rows;
  g.columns = grid.columns;
  g.stride = grid.turned ? 1 : s.stride[2];
  g.dilation = grid.turned ? 1 : s.dilation[2];
  g.outputs = s.out[2];
  g.output_step = channels;
  g.output_row = large ? s.out[2] * channels * bytes_of(format.type) : 0;
  g.padding = padding.data();
  g.taps = taps.data();
  g.input_flip = x.is_signed ? 0x80 : 0;
  g.input_zero_point = static_cast<int32_t>(x.zero_point + (x.is_signed ? 128 : 0));
  g.stage = requantization.stage();

  const std::vector<DepthwiseBlock> blocks = blocks_of(channels, kernels.max_width);
  const int64_t rows = s.batch * s.out[0] * s.out[1], row_outputs = s.out[2] * channels;
  const int64_t products = rows * row_outputs * grid.rows * grid.columns;
  const int64_t chunk = rows_at_once(s.stride[1] * s.in[2] * channels + row_outputs);
  for_pieces(rows, piece_count(products, kProductsOfThread), 1, [&](int64_t, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t prepared_size = kernels.prepared_size(g);
    const Scratch prepared(prepared_size * static_cast<int64_t>(blocks.size()));
    const Scratch scratch(kernels.scratch_size(g));
    for (size_t b = 0; b < blocks.size(); ++b)
      kernels.prepare(g, blocks[b], prepared.get() + static_cast<int64_t>(b) * prepared_size);
    std::vector<DepthwiseLine> lines(static_cast<size_t>(chunk * grid.rows));
    std::vector<void*> outputs(static_cast<size_t>(chunk));
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t count = std::min(chunk, end - first);
      for (int64_t i = 0; i < count; ++i) {
        set_lines(s, grid, x.data, padding.data(), first + i, channels, large, lines.data() + i * grid.rows);
        outputs[i] = static_cast<char*>(format.data) + (first + i) * row_outputs * bytes_of(format.type);
      }
      for (size_t b = 0; b < blocks.size(); ++b) {
        kernels.run(g, blocks[b], prepared.get() + static_cast<int64_t>(b) * prepared_size, lines.data(),
                    outputs.data(), count, scratch.get());
      }
    }
  });
}

}  // namespace

void depthwise_conv(const QuantizedValues& x, const ConvShape& shape, const uint8_t* packed,
                    const LayerScales& scales, const OutputFormat& format) {
  const int64_t times = shape.out_channels / shape.in_channels;
  if (times == 1) return convolve(x, shape, packed, scales, format);
  const int64_t values = shape.in[0] * shape.in[1] * shape.in[2] * shape.in_channels;
  ConvShape image = shape;
  image.batch = 1;
  QuantizedValues from = x;
  OutputFormat to = format;
  for (int64_t n = 0; n < shape.batch; ++n) {
    const auto copy = repeated(x.data + n * values, values, times);
    from.data = copy.get();
    convolve(from, image, packed, scales, to);
    to.data = static_cast<char*>(to.data) + image.positions() * shape.out_channels * bytes_of(to.type);
  }
}

}  // namespace fastquant
