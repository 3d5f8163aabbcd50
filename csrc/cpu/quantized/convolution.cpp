#include "convolution.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "../../memory.h"
#include "../arrays.h"
#include "depthwise.h"
#include "even_rows.h"
#include "kernels.h"
#include "matrix_kernels.h"
#include "measured_matrix.h"
#include "packing.h"
#include "shared_parts.h"

namespace fastquant {
namespace {

// Where weights stay in the L1 cache, so should what is read and written beside them.
constexpr int64_t kFirstCache = 24576, kWeightsInFirstCache = 32768;

// With so many steps, tiles of even rows are always faster than vectors. This is not left to a measurement: it
// would be wrong, as tiles run at a third of their speed for milliseconds after the processor has not used
// them.
constexpr int64_t kStepsForTiles = 64;

// From so many positions on, multiplying groups together saves more time than joining their weights takes.
constexpr int64_t kRowsOfJoinedGroups = 16;

// A convolution that has the same output, in as few dimensions as can be: where every output position is
// computed from one input position, in order, all of them are in one row.
ConvShape simplified(ConvShape s) {
  for (int d = 0; d < ConvShape::kDims; ++d) {
    if (s.kernel[d] != 1 || s.stride[d] != 1 || s.padding[d] != 0) return s;
  }
  s.in[2] = s.out[2] = s.positions();
  s.batch = s.in[0] = s.in[1] = s.out[0] = s.out[1] = 1;
  return s;
}

// How the values that an output position needs are found in memory.
enum class Access {
  // The values of all taps in a row of the kernel and of all channels lie next to each other.
  rows,
  // Those of all channels of a group do.
  taps,
  // They are copied together.
  copies,
};

// Finds the values that output positions need, and makes memory for those that are no part of x: padding, and
// what kernels read past its end.
class Convolution {
 public:
  Convolution(const uint8_t* x, uint8_t zero_point, const ConvShape& shape, const PackedLayout& layout)
      : x_(x), zero_point_(zero_point), s_(shape), layout_(layout) {
    const int64_t group_channels = s_.in_channels / s_.groups;
    if (s_.groups == 1 && (s_.dilation[2] == 1 || s_.kernel[2] == 1)) {
      access_ = Access::rows;
    } else if (group_channels % kStep == 0) {
      access_ = Access::taps;
    } else {
      access_ = Access::copies;
    }
    const int64_t kernel_rows = s_.kernel[0] * s_.kernel[1];
    segments_ = access_ == Access::rows ? kernel_rows : access_ == Access::taps ? layout.taps : 1;
    steps_ = layout.steps() / segments_;
    row_values_ = s_.in[2] * s_.in_channels;
    end_ = x_ + s_.batch * s_.in[0] * s_.in[1] * row_values_;
    find_edges();
  }

  Access access() const { return access_; }
  int64_t segments() const { return segments_; }
  int64_t steps() const { return steps_; }

  // Memory beside x that the positions [begin, end) refer to.
  struct Margins {
    std::unique_ptr<uint8_t[]> memory;
    const uint8_t* padding;  // values of padding
    const uint8_t* tail;     // the last 4 * steps() bytes of x, and more
    const uint8_t* strips;   // of the input rows from first_row on
    int64_t first_row;
  };

  Margins margins(int64_t begin, int64_t end) const {
    Margins m;
    const int64_t padding = rounded_up(std::max(kStep * steps_, s_.in_channels), kStep);
    const int64_t tail = access_ == Access::rows && row_overhang() ? kStep * steps_ + kStep : 0;
    const int64_t strip = strip_values();
    int64_t first = 0, last = 0;
    if (strip > 0) input_rows(begin, end, &first, &last);
    m.memory.reset(new uint8_t[padding + tail + (last - first) * strip]);
    m.first_row = first;
    uint8_t* at = m.memory.get();
    m.padding = at;
    std::memset(at, zero_point_, padding);
    at += padding;
    m.tail = at;
    if (tail > 0) copy_tail(at, tail);
    at += tail;
    m.strips = at;
    for (int64_t row = first; row < last; ++row, at += strip) fill_strip(row, at);
    return m;
  }

  // The pointers of MatrixRows for the positions [begin, end).
  void find(int64_t begin, int64_t end, const Margins& m, const uint8_t** pointers) const {
    const int64_t stride = end - begin;
    for_runs(begin, end, [&](int64_t n, int64_t z, int64_t y, int64_t from, int64_t to, int64_t at) {
      const uint8_t** segment = pointers + at;
      for (int64_t kz = 0; kz < s_.kernel[0]; ++kz) {
        for (int64_t ky = 0; ky < s_.kernel[1]; ++ky) {
          const int64_t row = input_row(n, z, y, kz, ky);
          if (access_ == Access::rows) {
            find_in_row(row, from, to, m, segment);
            segment += stride;
          } else {
            for (int64_t kx = 0; kx < s_.kernel[2]; ++kx, segment += stride) {
              find_taps(row, kx, from, to, m, segment);
            }
          }
        }
      }
    });
  }

  // Copies the values of a group for the positions [begin, end), each to 4 * steps() bytes.
  void copy(int64_t begin, int64_t end, int64_t group, uint8_t* to) const {
    const int64_t channels = s_.in_channels / s_.groups;
    const int64_t row_bytes = layout_.row_steps() * kStep;
    for_runs(begin, end, [&](int64_t n, int64_t z, int64_t y, int64_t from, int64_t stop, int64_t) {
      for (int64_t ox = from; ox < stop; ++ox) {
        for (int64_t kz = 0; kz < s_.kernel[0]; ++kz) {
          for (int64_t ky = 0; ky < s_.kernel[1]; ++ky, to += row_bytes) {
            copy_row(input_row(n, z, y, kz, ky), ox, group * channels, channels, to);
          }
        }
      }
    });
  }

 private:
  // Calls f(image, z, y, from, to, index) for the stretches [from, to) of output rows.
  template <class F>
  void for_runs(int64_t begin, int64_t end, const F& f) const {
    const int64_t width = s_.out[2];
    int64_t x = begin % width, row = begin / width;
    for (int64_t at = begin; at < end;) {
      const int64_t count = std::min(width - x, end - at);
      const int64_t y = row % s_.out[1], plane = row / s_.out[1];
      f(plane / s_.out[0], plane % s_.out[0], y, x, x + count, at - begin);
      at += count;
      x = 0;
      ++row;
    }
  }

  // The row of x that a row of the kernel meets, or -1 in the padding.
  int64_t input_row(int64_t n, int64_t z, int64_t y, int64_t kz, int64_t ky) const {
    const int64_t iz = z * s_.stride[0] - s_.padding[0] + kz * s_.dilation[0];
    const int64_t iy = y * s_.stride[1] - s_.padding[1] + ky * s_.dilation[1];
    if (iz < 0 || iz >= s_.in[0] || iy < 0 || iy >= s_.in[1]) return -1;
    return (n * s_.in[0] + iz) * s_.in[1] + iy;
  }

  // The rows of x that the positions [begin, end) need at most.
  void input_rows(int64_t begin, int64_t end, int64_t* first, int64_t* last) const {
    const auto bound = [&](int64_t position, int64_t sign) {
      int64_t row = position / s_.out[2];
      const int64_t y = row % s_.out[1], z = row / s_.out[1] % s_.out[0], n = row / s_.out[1] / s_.out[0];
      const auto of = [&](int d, int64_t at) {
        const int64_t reach = sign > 0 ? (s_.kernel[d] - 1) * s_.dilation[d] : 0;
        return std::min(std::max<int64_t>(at * s_.stride[d] - s_.padding[d] + reach, 0), s_.in[d] - 1);
      };
      if (s_.out[0] == 1) return (n * s_.in[0] + of(0, 0)) * s_.in[1] + of(1, y);
      return (n * s_.in[0] + of(0, z)) * s_.in[1] + (sign > 0 ? s_.in[1] - 1 : 0);
    };
    *first = bound(begin, -1);
    *last = bound(end - 1, 1) + 1;
  }

  // Whether a step may reach past the last value of a row of the kernel.
  bool row_overhang() const { return s_.kernel[2] * s_.in_channels % kStep != 0; }

  // ------------------------------------------------------------------ Access::rows
  //
  // Output positions whose values in a row reach into the padding read them from strips, copies of the ends of
  // a row of x together with the padding beside them: one strip for the positions [0, inside_from_) and one for
  // [inside_to_, …), or one for all positions.

  void find_edges() {
    const int64_t count = s_.out[2], stride = s_.stride[2], pad = s_.padding[2];
    inside_from_ = std::min(count, (pad + stride - 1) / stride);
    inside_to_ =
        std::min(count, std::max<int64_t>(0, floor_divided(s_.in[2] - s_.kernel[2] + pad, stride) + 1));
    if (access_ != Access::rows) return;
    const auto width = [&](int64_t from, int64_t to) {
      return to > from ? (to - from - 1) * stride + s_.kernel[2] : 0;
    };
    left_ = width(0, inside_from_);
    right_ = width(inside_to_, count);
    if (inside_from_ >= inside_to_ || left_ + right_ >= width(0, count)) {
      if (left_ + right_ > 0) inside_from_ = inside_to_ = count, left_ = width(0, count), right_ = 0;
    }
  }

  // A strip's values, and what may be read after them.
  int64_t strip_values() const {
    return left_ + right_ == 0 ? 0 : (left_ + right_) * s_.in_channels + 2 * kStep;
  }

  // Copies the columns [from, from + count) of a row of x, and padding where there are none.
  void copy_columns(int64_t row, int64_t from, int64_t count, uint8_t* to) const {
    const int64_t c = s_.in_channels;
    const int64_t before = std::min(std::max<int64_t>(-from, 0), count);
    const int64_t first = std::max<int64_t>(from, 0);
    const int64_t there = std::max<int64_t>(std::min(from + count, s_.in[2]) - first, 0);
    std::memset(to, zero_point_, before * c);
    std::memcpy(to + before * c, x_ + row * row_values_ + std::min(first, s_.in[2]) * c, there * c);
    std::memset(to + (before + there) * c, zero_point_, (count - before - there) * c);
  }

  void fill_strip(int64_t row, uint8_t* to) const {
    std::memset(to + left_ * s_.in_channels, 0, kStep);
    if (left_ > 0) copy_columns(row, -s_.padding[2], left_, to);
    to += left_ * s_.in_channels + kStep;
    if (right_ > 0) copy_columns(row, inside_to_ * s_.stride[2] - s_.padding[2], right_, to);
    std::memset(to + right_ * s_.in_channels, 0, kStep);
  }

  void copy_tail(uint8_t* to, int64_t bytes) const {
    const int64_t size = end_ - x_, wanted = kStep * steps_, there = std::min(size, wanted);
    std::memset(to, 0, bytes);
    std::memcpy(to + wanted - there, end_ - there, there);
  }

  // Pointers to the values in a row of x, for the positions [from, to).
  void find_in_row(int64_t row, int64_t from, int64_t to, const Margins& m, const uint8_t** at) const {
    if (row < 0) {
      std::fill(at, at + (to - from), m.padding);
      return;
    }
    const int64_t step = s_.stride[2] * s_.in_channels;
    const uint8_t* const strip = m.strips + (row - m.first_row) * strip_values();
    const uint8_t* const inside = x_ + row * row_values_ - s_.padding[2] * s_.in_channels;
    const uint8_t* const right = strip + left_ * s_.in_channels + kStep - inside_to_ * step;
    int64_t ox = from;
    const auto put_until = [&](int64_t end, const uint8_t* base) {
      at = put_steps(at, base + ox * step, step, end - ox);
      ox = std::max(ox, end);
    };
    put_until(std::min(to, inside_from_), strip);
    put_until(std::min(to, inside_to_), inside);
    if (row_overhang()) {
      // Of the last ones, a step may reach past the end of x.
      const uint8_t* const last = end_ - kStep * steps_;
      for (int64_t k = 1; k <= ox - std::max(from, inside_from_) && at[-k] > last; ++k) {
        at[-k] = m.tail + (at[-k] - last);
      }
    }
    put_until(to, right);
  }

  // Writes first, first + step, …: `count` pointers, where that is positive. Returns what follows them. Four at
  // once, because each takes longer to compute from the one before than to store.
  static const uint8_t** put_steps(const uint8_t** at, const uint8_t* first, int64_t step, int64_t count) {
    for (; count >= 4; count -= 4, at += 4, first += 4 * step) {
      at[0] = first;
      at[1] = first + step;
      at[2] = first + 2 * step;
      at[3] = first + 3 * step;
    }
    for (; count > 0; --count, first += step) *at++ = first;
    return at;
  }

  // ------------------------------------------------------------------ Access::taps

  void find_taps(int64_t row, int64_t kx, int64_t from, int64_t to, const Margins& m,
                 const uint8_t** at) const {
    if (row < 0) {
      std::fill(at, at + (to - from), m.padding);
      return;
    }
    const int64_t first = kx * s_.dilation[2] - s_.padding[2], stride = s_.stride[2];
    // Those of the positions [inside_from, inside_to) are in the row.
    const auto bounded = [&](int64_t ox) { return std::min(std::max(ox, from), to); };
    const int64_t inside_from = bounded(-floor_divided(first, stride));
    const int64_t inside_to = std::max(inside_from, bounded(floor_divided(s_.in[2] - 1 - first, stride) + 1));
    const uint8_t* const inside = x_ + row * row_values_ + first * s_.in_channels;
    const int64_t step = stride * s_.in_channels;
    at = std::fill_n(at, inside_from - from, m.padding);
    at = put_steps(at, inside + inside_from * step, step, inside_to - inside_from);
    std::fill_n(at, to - inside_to, m.padding);
  }

  // ---------------------------------------------------------------- Access::copies

  void copy_row(int64_t row, int64_t ox, int64_t channel, int64_t channels, uint8_t* to) const {
    for (int64_t kx = 0; kx < s_.kernel[2]; ++kx, to += channels) {
      const int64_t ix = ox * s_.stride[2] - s_.padding[2] + kx * s_.dilation[2];
      if (row < 0 || ix < 0 || ix >= s_.in[2]) {
        std::memset(to, zero_point_, channels);
      } else {
        const uint8_t* const from = x_ + row * row_values_ + ix * s_.in_channels + channel;
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
      }
    }
    std::memset(to, 0, layout_.row_steps() * kStep - s_.kernel[2] * channels);
  }

  const uint8_t* x_;
  const uint8_t* end_;
  uint8_t zero_point_;
  const ConvShape& s_;
  const PackedLayout& layout_;
  Access access_;
  int64_t segments_, steps_;
  int64_t row_values_;  // values in a row of x
  int64_t inside_from_ = 0, inside_to_ = 0, left_ = 0, right_ = 0;
};

// Where threads are uneven, others take over parts of a thread's share: so many parts at most, with so many
// products at least.
constexpr int64_t kPartsOfThread = 4, kProductsOfPart = 3000000;

// Positions at once, so that what is read and written for them stays in a cache.
int64_t positions_at_once(const Convolution& conv, const ConvShape& s, const PackedLayout& layout) {
  const int64_t weights = layout.groups * layout.group_bytes();
  int64_t values = s.stride[0] * s.stride[1] * s.stride[2] * s.in_channels;
  // Weights that no cache keeps are read once for all these positions, and outputs are written once.
  if (weights <= kSecondCache) values += s.out_channels;
  const int64_t fitting = (weights <= kWeightsInFirstCache ? kFirstCache : kSecondCache) / values;
  const int64_t most = conv.access() == Access::copies ? kSecondCache / (layout.steps() * kStep)
                                                       : kMostPointers / conv.segments();
  return std::max(kRowUnit, std::min(fitting, most) / kRowUnit * kRowUnit);
}

// The weights of groups that are multiplied together, packed as those of one group.
class JoinedGroups {
 public:
  explicit JoinedGroups(const PackedLayout& of_groups) : of_groups_(of_groups), layout_(of_groups) {
    layout_.groups = 1;
    layout_.out_channels *= of_groups.groups;
  }

  const PackedLayout& layout() const { return layout_; }

  std::unique_ptr<uint8_t[]> join(const uint8_t* packed) const {
    std::unique_ptr<uint8_t[]> joined(new uint8_t[layout_.bytes()]);
    const int64_t channels = of_groups_.out_channels, step = of_groups_.padded_channels() * kStep;
    for (int64_t group = 0; group < of_groups_.groups; ++group) {
      const int64_t first = group * channels, block = first / kBlockChannels;
      const int64_t width = block_channels(layout_.out_channels, block) * kStep;
      const uint8_t* from = packed + group * of_groups_.group_bytes();
      uint8_t* to = joined.get() + layout_.block_at(block) + first % kBlockChannels * kStep;
      for (int64_t k = 0; k < layout_.steps(); ++k, from += step, to += width)
        std::memcpy(to, from, channels * kStep);
      const int64_t sum = static_cast<int64_t>(sizeof(int32_t));
      std::memcpy(joined.get() + layout_.sums_at() + first * sum,
                  packed + of_groups_.sums_at() + group * of_groups_.padded_channels() * sum, channels * sum);
    }
    return joined;
  }

 private:
  const PackedLayout& of_groups_;
  PackedLayout layout_;
};

// The outputs at the positions [begin, end) of the blocks [first, last), which are counted over all groups.
void convolve(const MatrixKernels& kernels, const Convolution& conv, const ConvShape& s,
              const PackedLayout& layout, const uint8_t* packed, const Requantization& requantization,
              int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t at_once = std::min(end - begin, positions_at_once(conv, s, layout));
  const int64_t blocks = (layout.out_channels + kBlockChannels - 1) / kBlockChannels;
  const bool copies = conv.access() == Access::copies;
  const int64_t bytes = layout.steps() * kStep;
  const auto margins = copies ? Convolution::Margins() : conv.margins(begin, end);
  const std::unique_ptr<const uint8_t*[]> pointers(new const uint8_t*[conv.segments() * at_once]);
  const std::unique_ptr<uint8_t[]> copied(copies ? new uint8_t[at_once * bytes] : nullptr);
  const bool in_groups = layout.groups != s.groups;
  const std::unique_ptr<char[]> scratch(new char[kernels.scratch_size(layout.steps(), in_groups)]);
  for (int64_t from = begin; from < end; from += at_once) {
    const int64_t to = std::min(from + at_once, end);
    if (!copies) conv.find(from, to, margins, pointers.get());
    for (int64_t group = first / blocks; group * blocks < last; ++group) {
      if (copies) {
        conv.copy(from, to, group, copied.get());
        for (int64_t r = 0; r < to - from; ++r) pointers[r] = copied.get() + r * bytes;
      }
      const MatrixRows rows = {pointers.get(),  copies ? 0 : group * layout.in_channels,
                               to - from,       to - from,
                               conv.segments(), conv.steps()};
      const auto* const data = reinterpret_cast<const int8_t*>(packed + group * layout.group_bytes());
      const MatrixWeights weights = {data, layout.out_channels, layout.steps(), nullptr};
      if (in_groups) {
        kernels.multiply_groups(rows, weights, layout.in_channels, first, last, requantization.at(0, from),
                                scratch.get());
        continue;
      }
      kernels.multiply(rows, weights, std::max<int64_t>(first - group * blocks, 0),
                       std::min(last - group * blocks, blocks), requantization.at(group, from), scratch.get());
    }
  }
}

// The same, by rows that are equally spaced.
void convolve_even(const MatrixKernels& kernels, const EvenConvolution& conv, const PackedLayout& layout,
                   const uint8_t* packed, const Requantization& requantization, int64_t begin, int64_t end,
                   int64_t first, int64_t last) {
  const MatrixWeights weights = {reinterpret_cast<const int8_t*>(packed), layout.out_channels, layout.steps(),
                                 nullptr};
  conv.for_rows(begin, end, [&](const EvenRows& rows, int64_t position) {
    kernels.multiply_even(rows, weights, first, last, requantization.at(0, position));
  });
}

// Calls f(begin, end, first block, last block) in parallel: for all blocks of some positions or for some blocks
// of all positions, whichever makes threads read less. Parts but the last have a multiple of `unit` positions.
template <class F>
void for_parts(const ConvShape& s, const PackedLayout& layout, int64_t unit, const F& f) {
  const int64_t positions = s.positions();
  const int64_t blocks = layout.groups * ((layout.out_channels + kBlockChannels - 1) / kBlockChannels);
  const int64_t weights = layout.groups * layout.group_bytes(), products = positions * weights;
  const int64_t values = s.batch * s.in[0] * s.in[1] * s.in[2] * s.in_channels;
  const int64_t threads = piece_count(products, kProductsOfThread);
  const bool even = blocks % threads == 0 || blocks >= 8 * threads;
  const bool by_blocks = (weights > values && even) || positions < 2 * kRowUnit * threads;
  const int64_t units = by_blocks ? blocks : (positions + unit - 1) / unit;
  const int64_t most = threads == 1 ? 1 : std::min(products / threads / kProductsOfPart, kPartsOfThread);
  for_shared_parts(units, std::min(threads, units), most, [&](int64_t from, int64_t to) {
    if (by_blocks) {
      f(int64_t{0}, positions, from, to);
    } else {
      f(from * unit, std::min(to * unit, positions), int64_t{0}, blocks);
    }
  });
}

}  // namespace

void quantized_conv(const QuantizedValues& x, const ConvShape& given, const uint8_t* packed,
                    const LayerScales& scales, const OutputFormat& format) {
  const ConvShape s = simplified(given);
  if (s.positions() == 0 || s.out_channels == 0) return;
  const int64_t shape[] = {s.out_channels, s.in_channels / s.groups, s.kernel[0], s.kernel[1], s.kernel[2]};
  const PackedLayout of_groups(shape, 5, s.groups, false);
  if (of_groups.depthwise()) return depthwise_conv(x, given, packed, scales, format);
  const JoinedGroups together(of_groups);
  std::unique_ptr<uint8_t[]> joined_weights;
  const MatrixKernels& kernels = *quantized_kernels().matrix;
  const bool joined = kernels.multiply_groups != nullptr && s.positions() >= kRowsOfJoinedGroups &&
                      shares_blocks(s.groups, of_groups.in_channels, of_groups.out_channels);
  if (joined) {
    joined_weights = together.join(packed);
    packed = joined_weights.get();
  }
  const PackedLayout& layout = joined ? together.layout() : of_groups;
  // Kernels take values from 0 to 255: those of int8 are moved there, with their zero point.
  const int64_t n = s.batch * s.in[0] * s.in[1] * s.in[2] * s.in_channels;
  const uint8_t* data = x.data;
  std::unique_ptr<uint8_t[]> moved;
  if (x.is_signed) {
    moved.reset(new uint8_t[n]);
    for (int64_t i = 0; i < n; ++i) moved[i] = data[i] ^ 0x80;
    data = moved.get();
  }
  const int64_t zero_point = x.zero_point + (x.is_signed ? 128 : 0);
  const Requantization requantization(layout.groups, layout.out_channels, layout.padded_channels(),
                                      packed + layout.sums_at(), x.scale, zero_point - kernels.value_offset,
                                      scales, format);
  const EvenConvolution even(data, static_cast<uint8_t>(zero_point), s, layout);
  const Convolution conv(data, static_cast<uint8_t>(zero_point), s, layout);
  const bool is_even = kernels.multiply_even != nullptr && even.possible();
  const int64_t unit = is_even ? even.unit() : kRowUnit;
  for_parts(s, layout, unit, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const PartSize size = {end - begin,
                           {last - first, s.in_channels, s.groups, s.out_channels, s.out[1] == 1 ? 0 : s.in[2],
                            s.kernel[1] * s.kernel[0], s.kernel[2], s.stride[2], s.dilation[2]}};
    const ChosenKernels chosen(size, !is_even || layout.steps() < kStepsForTiles);
    if (is_even && (*chosen).multiply_even != nullptr) {
      convolve_even(*chosen, even, layout, packed, requantization, begin, end, first, last);
    } else {
      convolve(*chosen, conv, s, layout, packed, requantization, begin, end, first, last);
    }
  });
}

void quantized_linear(const QuantizedValues& x, int64_t rows, int64_t in_features, int64_t out_features,
                      const uint8_t* packed, const LayerScales& scales, const OutputFormat& format) {
  const ConvShape shape = {rows,      in_features, out_features, 1,         {1, 1, 1},
                           {1, 1, 1}, {1, 1, 1},   {1, 1, 1},    {0, 0, 0}, {1, 1, 1}};
  quantized_conv(x, shape, packed, scales, format);
}

}  // namespace fastquant
