#include "packing.h"

#include <cstring>

#include "../../memory.h"
#include "../arrays.h"

namespace fastquant {
namespace {

// Calls f(packed index, weight index) for each weight of a tap and output channel.
template <class F>
void for_weights_of_tap(const PackedLayout& layout, int64_t group, int64_t channel, int64_t tap, const F& f) {
  const int64_t block = channel / kBlockChannels, width = block_channels(layout.out_channels, block);
  const int64_t row_steps = layout.row_steps();
  const int64_t base = group * layout.group_bytes() + layout.block_at(block) + channel % kBlockChannels * kStep;
  // Where the weight of the first tap and input channel is, and how far it is from one input channel to the
  // next.
  const int64_t in_stride = layout.transposed ? layout.out_channels * layout.taps : layout.taps;
  const int64_t first = layout.transposed
                            ? (group * layout.in_channels * layout.out_channels + channel) * layout.taps
                            : (group * layout.out_channels + channel) * layout.in_channels * layout.taps;
  const int64_t row = tap / layout.row_taps;
  int64_t at = tap % layout.row_taps * layout.in_channels;
  for (int64_t i = 0; i < layout.in_channels; ++i, ++at) {
    const int64_t step = row * row_steps + at / kStep;
    f(base + step * width * kStep + at % kStep, first + i * in_stride + tap);
  }
}

// The same for all depthwise weights.
template <class F>
void for_depthwise_weights(const PackedLayout& layout, const F& f) {
  const int64_t channels = layout.groups * layout.out_channels, width = rounded_up(channels, kLaneChannels);
  for (int64_t tap = 0; tap < layout.taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) f(tap * width + c, c * layout.taps + tap);
  }
}

template <class F>
void for_channels(const PackedLayout& layout, const F& f) {
  const int64_t channels = layout.groups * layout.out_channels;
  const int64_t weights = channels * layout.in_channels * layout.taps;
  for_pieces(channels, piece_count(weights), 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c / layout.out_channels, c % layout.out_channels);
  });
}

}  // namespace

PackedLayout::PackedLayout(const int64_t* shape, int64_t dims, int64_t group_count, bool is_transposed)
    : groups(group_count), taps(1), row_taps(1), transposed(is_transposed) {
  check(dims >= 2 && groups > 0, "a weight needs 2 dimensions or more, has ", dims);
  check(shape[0] % groups == 0, shape[0], " channels cannot be split into ", groups, " groups");
  in_channels = transposed ? shape[0] / groups : shape[1];
  out_channels = transposed ? shape[1] : shape[0] / groups;
  for (int64_t d = 2; d < dims; ++d) taps *= shape[d];
  if (!transposed && dims > 2 && taps > 0) row_taps = shape[dims - 1];
}

void pack_weight(const int8_t* weight, const PackedLayout& layout, uint8_t* packed) {
  std::memset(packed, 0, layout.bytes());
  if (layout.depthwise()) {
    for_depthwise_weights(layout,
                          [&](int64_t to, int64_t from) { packed[to] = static_cast<uint8_t>(weight[from]); });
    return;
  }
  int32_t* const sums = reinterpret_cast<int32_t*>(packed + layout.sums_at());
  for_channels(layout, [&](int64_t group, int64_t channel) {
    int32_t* to_sum = sums + group * layout.padded_channels() + channel;
    int32_t sum = 0;
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for_weights_of_tap(layout, group, channel, tap, [&](int64_t to, int64_t from) {
        packed[to] = static_cast<uint8_t>(weight[from]);
        sum += weight[from];
      });
      std::memcpy(to_sum, &sum, sizeof sum);
      if (!layout.transposed) continue;
      to_sum += layout.groups * layout.padded_channels();
      sum = 0;
    }
  });
}

void unpack_weight(const uint8_t* packed, const PackedLayout& layout, int8_t* weight) {
  if (layout.depthwise()) {
    for_depthwise_weights(layout,
                          [&](int64_t from, int64_t to) { weight[to] = static_cast<int8_t>(packed[from]); });
    return;
  }
  for_channels(layout, [&](int64_t group, int64_t channel) {
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for_weights_of_tap(layout, group, channel, tap,
                         [&](int64_t from, int64_t to) { weight[to] = static_cast<int8_t>(packed[from]); });
    }
  });
}

}  // namespace fastquant
