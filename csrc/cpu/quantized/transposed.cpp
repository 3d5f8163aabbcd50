#include "transposed.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../../memory.h"
#include "../arrays.h"
#include "axes.h"
#include "depthwise.h"
#include "kernels.h"
#include "matrix_kernels.h"
#include "measured_matrix.h"
#include "packing.h"

namespace fastquant {
namespace {

// x as the matrix kernel takes it: unsigned, and the channels of each group filled up to whole steps.
class Values {
 public:
  Values(const QuantizedValues& x, const ConvShape& s)
      : zero_point_(static_cast<uint8_t>(x.zero_point + (x.is_signed ? 128 : 0))) {
    const int64_t channels = s.in_channels / s.groups, positions = s.batch * s.in[0] * s.in[1] * s.in[2];
    group_ = rounded_up(channels, kStep);
    position_ = group_ * s.groups;
    data_ = x.data;
    if (x.is_signed || group_ != channels) {
      copy_.reset(new uint8_t[positions * position_]);
      const uint8_t flip = x.is_signed ? 0x80 : 0;
      for (int64_t i = 0; i < positions * s.groups; ++i) {
        uint8_t* const to = copy_.get() + i * group_;
        for (int64_t c = 0; c < channels; ++c) to[c] = x.data[i * channels + c] ^ flip;
        std::memset(to + channels, 0, group_ - channels);
      }
      data_ = copy_.get();
    }
    padding_.assign(static_cast<size_t>(position_), zero_point_);
  }

  int64_t group() const { return group_; }  // bytes from group to group
  const uint8_t* at(int64_t position) const { return data_ + position * position_; }
  const uint8_t* padding() const { return padding_.data(); }
  int64_t zero_point() const { return zero_point_; }

 private:
  uint8_t zero_point_;
  int64_t group_, position_;
  const uint8_t* data_;
  std::unique_ptr<uint8_t[]> copy_;
  std::vector<uint8_t> padding_;
};

// One part of the convolution (axes.h).
class Part {
 public:
  Part(const Axes& axes, const Values& values, const ConvShape& s, const PackedLayout& layout,
       const uint8_t* packed, double x_scale, const LayerScales& scales, const OutputFormat& format)
      : axes_(axes),
        values_(values),
        s_(s),
        layout_(layout),
        packed_(packed),
        output_(format.data),
        first_steps_(steps_of_taps()),
        requantization_(s.groups, layout.out_channels, layout.padded_channels(), sums_of_weights().data(),
                        x_scale, values.zero_point() - quantized_kernels().matrix->value_offset, scales,
                        format) {}

  int64_t positions() const { return axes_.positions(s_.batch); }

  // Computes the outputs at the positions [begin, end): next to each other in a buffer, which is then
  // distributed.
  void run(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    const int64_t taps = axes_.taps(), row = s_.out_channels * bytes_of(requantization_.stage().type);
    const int64_t fitting = kSecondCache / (s_.in_channels + row);
    const int64_t most = std::min(fitting, kMostPointers / std::max<int64_t>(taps, 1));
    const int64_t at_once = std::min(end - begin, std::max(kRowUnit, most / kRowUnit * kRowUnit));
    const std::unique_ptr<const uint8_t*[]> pointers(new const uint8_t*[taps * at_once]);
    const std::unique_ptr<int64_t[]> places(new int64_t[at_once]);
    const std::unique_ptr<char[]> outputs(new char[at_once * row]);
    const ChosenKernels chosen(
        {end - begin,
         {0, s_.in_channels, s_.groups, s_.out_channels, taps, axes_.dims[2].count, axes_.dims[1].count, 0, 0}},
        true);
    const MatrixKernels& kernels = *chosen;
    const std::unique_ptr<char[]> scratch(new char[kernels.scratch_size(taps * layout_.row_steps(), false)]);
    const int64_t blocks = (layout_.out_channels + kBlockChannels - 1) / kBlockChannels;
    for (int64_t from = begin; from < end; from += at_once) {
      const int64_t count = std::min(at_once, end - from);
      find(from, count, pointers.get(), places.get());
      for (int64_t group = 0; group < s_.groups; ++group) {
        const MatrixRows rows = {pointers.get(), group * values_.group(), count, count,
                                 taps,           layout_.row_steps()};
        const auto* const data = reinterpret_cast<const int8_t*>(packed_ + group * layout_.group_bytes());
        const MatrixWeights weights = {data, layout_.out_channels, layout_.steps(), first_steps_.data()};
        OutputStage stage = requantization_.at(group, 0);
        stage.data = outputs.get() + (static_cast<char*>(stage.data) - static_cast<char*>(output_));
        kernels.multiply(rows, weights, 0, blocks, stage, scratch.get());
      }
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(static_cast<char*>(output_) + places[i] * row, outputs.get() + i * row, row);
    }
  }

 private:
  // Calls f(tap of each dimension, ..).
  template <class F>
  void for_taps(const F& f) const {
    for (const Axis::Tap& z : axes_.dims[0].taps) {
      for (const Axis::Tap& y : axes_.dims[1].taps) {
        for (const Axis::Tap& x : axes_.dims[2].taps) f(z, y, x);
      }
    }
  }

  int64_t index(const Axis::Tap& z, const Axis::Tap& y, const Axis::Tap& x) const {
    return (z.index * s_.kernel[1] + y.index) * s_.kernel[2] + x.index;
  }

  std::vector<int64_t> steps_of_taps() const {
    std::vector<int64_t> steps;
    for_taps([&](const auto&... tap) { steps.push_back(index(tap...) * layout_.row_steps()); });
    return steps;
  }

  // Of each channel, over the taps of this part.
  std::vector<int32_t> sums_of_weights() const {
    const int64_t channels = s_.groups * layout_.padded_channels();
    std::vector<int32_t> sums(static_cast<size_t>(channels), 0);
    for_taps([&](const auto&... tap) {
      const uint8_t* const from = packed_ + layout_.sums_at() + index(tap...) * channels * 4;
      for (int64_t c = 0; c < channels; ++c) {
        int32_t sum;
        std::memcpy(&sum, from + c * 4, sizeof sum);
        sums[static_cast<size_t>(c)] += sum;
      }
    });
    return sums;
  }

  // Where the positions from `first` on find their values, and where their outputs belong.
  void find(int64_t first, int64_t count, const uint8_t** pointers, int64_t* places) const {
    const Axis &z = axes_.dims[0], &y = axes_.dims[1], &x = axes_.dims[2];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = first + i, ox = at % x.count, row = at / x.count;
      const int64_t oy = row % y.count, oz = row / y.count % z.count, n = row / y.count / z.count;
      const uint8_t** pointer = pointers + i;
      for_taps([&](const Axis::Tap& tz, const Axis::Tap& ty, const Axis::Tap& tx) {
        const int64_t iz = oz + tz.offset, iy = oy + ty.offset, ix = ox + tx.offset;
        const bool inside = iz >= 0 && iz < z.in && iy >= 0 && iy < y.in && ix >= 0 && ix < x.in;
        *pointer = inside ? values_.at(((n * z.in + iz) * y.in + iy) * x.in + ix) : values_.padding();
        pointer += count;
      });
      const int64_t place = (n * s_.out[0] + z.first + oz * z.step) * s_.out[1] + y.first + oy * y.step;
      places[i] = place * s_.out[2] + x.first + ox * x.step;
    }
  }

  const Axes& axes_;
  const Values& values_;
  const ConvShape& s_;
  const PackedLayout& layout_;
  const uint8_t* packed_;
  void* output_;
  std::vector<int64_t> first_steps_;
  Requantization requantization_;
};

}  // namespace

void quantized_conv_transpose(const QuantizedValues& x, const ConvShape& s, const uint8_t* packed,
                              const LayerScales& scales, const OutputFormat& format) {
  if (s.positions() == 0 || s.out_channels == 0) return;
  const int64_t shape[] = {s.in_channels, s.out_channels / s.groups, s.kernel[0], s.kernel[1], s.kernel[2]};
  const PackedLayout layout(shape, 5, s.groups, true);
  if (layout.depthwise()) return depthwise_conv_transpose(x, s, packed, scales, format);
  const Values values(x, s);
  const std::vector<Axes> axes = axes_of_transposed(s);
  std::vector<std::unique_ptr<const Part>> parts;
  int64_t products = 0;
  for (const Axes& a : axes) {
    parts.push_back(std::make_unique<Part>(a, values, s, layout, packed, x.scale, scales, format));
    products += parts.back()->positions() * a.taps() * s.in_channels * layout.out_channels;
  }
  const int64_t pieces = piece_count(products, kProductsOfThread);
  for_pieces(pieces, pieces, 1, [&](int64_t piece, int64_t, int64_t) {
    for (const auto& part : parts)
      part->run(part->positions() * piece / pieces, part->positions() * (piece + 1) / pieces);
  });
}

}  // namespace fastquant
