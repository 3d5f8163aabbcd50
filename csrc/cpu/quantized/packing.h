// The layout of packed weights. It is the same on every processor, and
// python/fastquant/_native/reference/quantized.py defines it, too.
//
// The weights of one output channel, in the order in which a kernel meets the values of x, are padded with
// zeros at the end of every row, so that each row has a whole number of steps of four weights. A row is what
// lies next to each other in a channels-last x: the kernel's last dimension and the input channels; in a
// transposed convolution, where kernels walk over single taps, the input channels alone.
//
// Depthwise weights, whose groups have one input channel, are packed tap by tap instead: an array [taps][output
// channels of all groups, rounded up to 16], filled up with zeros, and no sums.
//
// The channels of a group are cut into blocks of 64; the last block is filled up with zeros to a multiple of 16
// channels. A block of n channels is an array [steps][n][4]. The blocks of a group follow each other, as do the
// groups. After all of them come the sums of each channel's weights, int32 [groups][channels rounded up to 16],
// little-endian; in a transposed convolution, such sums for each tap, [taps][groups][channels rounded up to
// 16].
#pragma once

#include <cstdint>

namespace fastquant {

constexpr int64_t kBlockChannels = 64, kLaneChannels = 16, kStep = 4;

static inline constexpr int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct PackedLayout {
  // shape: of the weight, `dims` sizes.
  PackedLayout(const int64_t* shape, int64_t dims, int64_t groups, bool transposed);

  int64_t groups;
  int64_t out_channels;  // of a group
  int64_t in_channels;   // of a group
  int64_t taps;          // positions of the kernel
  int64_t row_taps;      // of which this many are in a row
  bool transposed;

  bool depthwise() const { return groups > 1 && in_channels == 1; }
  int64_t row_steps() const { return rounded_up(row_taps * in_channels, kStep) / kStep; }
  int64_t steps() const { return taps / row_taps * row_steps(); }
  int64_t padded_channels() const { return rounded_up(out_channels, kLaneChannels); }
  int64_t group_bytes() const { return steps() * kStep * padded_channels(); }
  int64_t sums_at() const { return groups * group_bytes(); }
  int64_t bytes() const {
    if (depthwise()) return taps * rounded_up(groups * out_channels, kLaneChannels);
    const int64_t sums = (transposed ? taps : 1) * groups * padded_channels();
    return sums_at() + sums * static_cast<int64_t>(sizeof(int32_t));
  }

  // The place of the weights of a block, from the group's first on.
  int64_t block_at(int64_t block) const { return block * kBlockChannels * steps() * kStep; }
};

// The channels that a block has room for.
static inline constexpr int64_t block_channels(int64_t channels, int64_t block) {
  const int64_t left = rounded_up(channels - block * kBlockChannels, kLaneChannels);
  return left < kBlockChannels ? left : kBlockChannels;
}

// weight: contiguous int8. packed has layout.bytes() bytes.
void pack_weight(const int8_t* weight, const PackedLayout& layout, uint8_t* packed);
void unpack_weight(const uint8_t* packed, const PackedLayout& layout, int8_t* weight);

}  // namespace fastquant
