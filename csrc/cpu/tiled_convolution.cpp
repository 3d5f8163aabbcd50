#include "tiled_convolution.h"

#include <atomic>

#include "arrays.h"
#include "tile_kernels.h"

namespace fastquant {
namespace {

constexpr int64_t kWide = 2 * kTileSide;

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
int64_t rounded_up(int64_t n, int64_t unit) { return blocks_of(n, unit) * unit; }

// Images as one sequence of positions. Behind each line there is `padding` positions of zeros, which pad the
// beginning of the next one as well, and behind each image a line of zeros. So a tap is the same number of
// positions away from an output everywhere.
struct Positions {
  explicit Positions(const TiledLayer& layer)
      : padding(layer.kernel / 2),
        // Without padding, a small image can be one line.
        is_line(padding == 0 && layer.height * layer.width <= kLongLine),
        height(is_line ? 1 : layer.height),
        width(is_line ? layer.height * layer.width : layer.width),
        line(width + padding),
        lines(height + padding),
        margin((line + 1) * padding),
        taps(layer.kernel * layer.kernel) {
    for (int64_t t = 0; t < taps; ++t) {
      offsets[t] = (t / layer.kernel - padding) * line + t % layer.kernel - padding;
    }
  }

  int64_t of_images(int64_t images) const { return images * lines * line; }

  // Elements of a row of positions with margins for taps and whole tiles. Rows must not begin a power of two
  // apart: they would take the same places of a cache.
  int64_t row(int64_t images) const { return rounded_up(of_images(images) + 2 * margin + kWide, 32) + 32; }

  static constexpr int64_t kLongLine = 1024;

  int64_t padding;
  bool is_line;
  int64_t height, width, line, lines, margin, taps;
  int64_t offsets[9];
};

// How many images to compute at once, of so many channels. Their values are in the second cache.
int64_t images_at_once(const TiledLayer& layer, const Positions& p, int64_t channels) {
  constexpr int64_t kCached = int64_t{256} << 10;
  return std::clamp<int64_t>(kCached / (p.of_images(1) * channels), 1, layer.images);
}

int64_t threads_for(const TiledLayer& s) {
  constexpr int64_t kProductsOfThread = 256 * kGrain;  // that take the time that starting a thread does
  return piece_count(s.images * s.inputs * s.outputs * s.height * s.width * s.kernel * s.kernel,
                     kProductsOfThread);
}

// A weight as blocks of kTileSide outputs and kTileDepth inputs of each tap.
std::vector<BFloat16> weight_blocks(const BFloat16* weight, int64_t outputs, int64_t inputs, int64_t taps,
                                    int64_t threads) {
  const int64_t across = blocks_of(inputs, kTileDepth), down = blocks_of(outputs, kTileSide);
  std::vector<BFloat16> blocks(down * across * taps * kTileSide * kTileDepth);
  for_pieces(outputs, threads, kTileSide, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t i = 0; i < inputs; i += kTileDepth) {
        const int64_t block = o / kTileSide * across + i / kTileDepth;
        BFloat16* const to = blocks.data() + (block * taps * kTileSide + o % kTileSide) * kTileDepth;
        const BFloat16* const from = weight + (o * inputs + i) * taps;
        const int64_t count = std::min(kTileDepth, inputs - i);
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t k = 0; k < count; ++k) to[t * kTileSide * kTileDepth + k] = from[k * taps + t];
        }
      }
    }
  });
  return blocks;
}

// The same of the weight whose convolution with the outputs' gradient is that of the inputs: with inputs and
// outputs exchanged, turned by 180 degrees.
std::vector<BFloat16> turned_blocks(const BFloat16* weight, int64_t outputs, int64_t inputs, int64_t taps,
                                    int64_t threads) {
  const int64_t across = blocks_of(outputs, kTileDepth), down = blocks_of(inputs, kTileSide);
  std::vector<BFloat16> blocks(down * across * taps * kTileSide * kTileDepth);
  for_pieces(inputs, threads, kTileSide, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kTileSide) {
      const int64_t count = std::min(kTileSide, end - i);
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t block = i / kTileSide * across + o / kTileDepth;
        BFloat16* const to = blocks.data() + block * taps * kTileSide * kTileDepth + o % kTileDepth;
        const BFloat16* const from = weight + (o * inputs + i) * taps;
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t k = 0; k < count; ++k) {
            to[(t * kTileSide + k) * kTileDepth] = from[k * taps + taps - 1 - t];
          }
        }
      }
    }
  });
  return blocks;
}

// Convolves images with the blocks of a weight.
class Convolution {
 public:
  Convolution(const TiledLayer& layer, const BFloat16* x, const std::vector<BFloat16>& weight,
              const BFloat16* bias, BFloat16* y)
      : layer_(layer), positions_(layer), x_(x), weight_(weight), bias_(bias), y_(y) {}

  // Whether all results are finite.
  bool compute(int64_t threads) {
    const int64_t most = images_at_once(layer_, positions_, layer_.inputs);
    const int64_t at_once = std::min(most, blocks_of(layer_.images, threads));
    const int64_t groups = blocks_of(layer_.images, at_once);
    // Few images do not suffice for all threads, which then share the outputs.
    const int64_t pairs = blocks_of(layer_.outputs, kWide);
    const int64_t parts = std::min(blocks_of(threads, groups), pairs);
    std::atomic<bool> finite{true};
    for_pieces(groups * parts, std::min(threads, groups * parts), 1, [&](int64_t, int64_t begin, int64_t end) {
      if (begin >= end) return;
      const int64_t row = positions_.row(at_once);
      std::vector<uint32_t> packed(blocks_of(layer_.inputs, kTileDepth) * kTileSide * row);
      std::vector<float> sums(kWide * sums_stride());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / parts * at_once, part = i % parts;
        const Group group = {first, std::min(at_once, layer_.images - first), row};
        if (i == begin || part == 0) pack(group, packed.data());
        if (!multiply(group, packed.data(), pairs * part / parts, pairs * (part + 1) / parts, sums.data())) {
          finite.store(false, std::memory_order_relaxed);
        }
      }
    });
    return finite.load(std::memory_order_relaxed);
  }

 private:
  struct Group {
    int64_t first, images, row;
  };

  int64_t lines_at_once() const { return std::max<int64_t>(Positions::kLongLine / positions_.line, 1); }
  int64_t sums_stride() const { return rounded_up(lines_at_once() * positions_.line, kWide) + kTileSide; }

  void pack(const Group& group, uint32_t* packed) const {
    const int64_t plane = positions_.height * positions_.width;
    for (int64_t n = 0; n < group.images; ++n) {
      tile_kernels()->pair_rows(
          x_ + (group.first + n) * layer_.inputs * plane, plane, layer_.inputs, positions_.height,
          positions_.width, packed + positions_.margin + positions_.of_images(n), group.row, positions_.line);
    }
  }

  // The outputs of the pairs of blocks [begin, end).
  bool multiply(const Group& group, const uint32_t* packed, int64_t begin, int64_t end, float* sums) const {
    TileProduct p = {};
    p.offsets = positions_.offsets, p.taps = positions_.taps, p.pair_stride = group.row;
    p.inner_blocks = blocks_of(layer_.inputs, kTileDepth), p.y = sums, p.y_stride = sums_stride();
    const int64_t blocks = blocks_of(layer_.outputs, kTileSide), lines = group.images * positions_.lines;
    bool finite = true;
    for (int64_t line = 0; line < lines; line += lines_at_once()) {
      const int64_t count = std::min(lines_at_once(), lines - line);
      p.x = packed + positions_.margin + line * positions_.line;
      p.positions = rounded_up(count * positions_.line, kWide);
      for (int64_t pair = begin; pair < end; ++pair) {
        p.weight = weight_.data() + pair * 2 * p.inner_blocks * p.taps * kTileSide * kTileDepth;
        tile_kernels()->product(p, std::min<int64_t>(blocks - pair * 2, 2));
        finite &= write(group, line, count, pair * kWide, sums);
      }
    }
    return finite;
  }

  // Writes the outputs of some lines for the channels of a pair of blocks.
  bool write(const Group& group, int64_t begin, int64_t count, int64_t first_output, const float* sums) const {
    const int64_t outputs = std::min(kWide, layer_.outputs - first_output);
    bool finite = true;
    for (int64_t line = begin; line < begin + count;) {
      const int64_t n = line / positions_.lines, row = line % positions_.lines;
      const int64_t stop = std::min((n + 1) * positions_.lines, begin + count);
      const int64_t there = std::min(stop - line, positions_.height - row);
      for (int64_t o = 0; o < outputs && there > 0; ++o) {
        const int64_t output = first_output + o, channel = (group.first + n) * layer_.outputs + output;
        finite &=
            tile_kernels()->narrow(sums + o * sums_stride() + (line - begin) * positions_.line, positions_.line,
                                   there, positions_.width, bias_ == nullptr ? 0.0f : to_compute(bias_[output]),
                                   y_ + (channel * positions_.height + row) * positions_.width);
      }
      line = stop;
    }
    return finite;
  }

  const TiledLayer layer_;
  const Positions positions_;
  const BFloat16* const x_;
  const std::vector<BFloat16>& weight_;
  const BFloat16* const bias_;
  BFloat16* const y_;
};

// Computes the gradient of a weight, by groups of some images.
class WeightGradient {
 public:
  WeightGradient(const TiledLayer& layer, const BFloat16* grad, const BFloat16* x, BFloat16* grad_weight)
      : layer_(layer),
        positions_(layer),
        images_(images_at_once(layer, positions_, std::max(layer.inputs, layer.outputs))),
        groups_(blocks_of(layer.images, images_)),
        steps_(rounded_up(positions_.of_images(images_), kTileDepth)),
        row_(positions_.row(images_)),
        outputs_(rounded_up(layer.outputs, kWide)),
        inputs_(rounded_up(layer.inputs, kWide)),
        grad_(grad),
        x_(x),
        grad_weight_(grad_weight) {}

  // Whether all results are finite.
  bool compute(int64_t threads) {
    const int64_t pairs = outputs_ / kWide * (inputs_ / kWide), sums_of_pair = positions_.taps * kWide * kWide;
    // Groups that are packed at once: for all threads, and so many that they take as much memory as the sums.
    const int64_t of_group = (outputs_ * row_ + inputs_ * steps_) / 2;
    const int64_t at_once = std::min(std::max(threads, pairs * sums_of_pair / of_group), groups_);
    grads_.resize(at_once * outputs_ * row_);
    pairs_.resize(at_once * steps_ / 2 * inputs_);
    std::vector<float> sums(at_once < groups_ ? pairs * sums_of_pair : 0);
    std::atomic<bool> finite{true};
    for (int64_t first = 0; first < groups_; first += at_once) {
      const int64_t count = std::min(at_once, groups_ - first);
      for_pieces(count, std::min(threads, count), 1, [&](int64_t, int64_t begin, int64_t end) {
        if (begin >= end) return;
        std::vector<BFloat16> placed(inputs_ * row_);
        for (int64_t i = begin; i < end; ++i) pack(first + i, i, placed.data());
      });
      for_pieces(pairs, std::min(threads, pairs), 1, [&](int64_t, int64_t begin, int64_t end) {
        if (begin >= end) return;
        std::vector<float> of_all_groups(sums.empty() ? sums_of_pair : 0);
        for (int64_t pair = begin; pair < end; ++pair) {
          float* const into = sums.empty() ? of_all_groups.data() : sums.data() + pair * sums_of_pair;
          if (sums.empty()) std::fill_n(into, sums_of_pair, 0.0f);
          add(pair, count, into);
          if (first + count == groups_ && !write(pair, into)) finite.store(false, std::memory_order_relaxed);
        }
      });
    }
    return finite.load(std::memory_order_relaxed);
  }

 private:
  void pack(int64_t group, int64_t place, BFloat16* placed) {
    const int64_t plane = positions_.height * positions_.width, first = group * images_;
    const int64_t images = std::min(images_, layer_.images - first);
    BFloat16* const grads = grads_.data() + place * outputs_ * row_ + positions_.margin;
    if (images < images_) {  // another group's images may be there
      std::fill_n(placed, inputs_ * row_, BFloat16{});
      std::fill_n(grads - positions_.margin, outputs_ * row_, BFloat16{});
    }
    for (int64_t n = 0; n < images; ++n) {
      const int64_t image = first + n, at = positions_.of_images(n);
      tile_kernels()->place_rows(grad_ + image * layer_.outputs * plane, plane, layer_.outputs,
                                 positions_.height, positions_.width, grads + at, row_, positions_.line);
      tile_kernels()->place_rows(x_ + image * layer_.inputs * plane, plane, layer_.inputs, positions_.height,
                                 positions_.width, placed + at, row_, positions_.line);
    }
    tile_kernels()->transpose(reinterpret_cast<const uint32_t*>(placed), row_ / 2, inputs_, steps_ / 2,
                              pairs_.data() + place * steps_ / 2 * inputs_, inputs_);
  }

  // The number of the first output, and input, of a pair of two blocks of outputs and two of inputs.
  int64_t output_of(int64_t pair) const { return pair / (inputs_ / kWide) * kWide; }
  int64_t input_of(int64_t pair) const { return pair % (inputs_ / kWide) * kWide; }

  // Adds what the packed groups contribute to a pair of blocks.
  void add(int64_t pair, int64_t groups, float* sums) const {
    TileSums s = {};
    s.grad_stride = row_, s.x_stride = inputs_, s.positions = steps_, s.sums = sums;
    s.offsets = positions_.offsets, s.taps = positions_.taps;
    for (int64_t group = 0; group < groups; ++group) {
      s.grad = grads_.data() + (group * outputs_ + output_of(pair)) * row_ + positions_.margin;
      s.x = pairs_.data() + group * steps_ / 2 * inputs_ + input_of(pair);
      tile_kernels()->sums(s);
    }
  }

  bool write(int64_t pair, const float* sums) const {
    const int64_t output = output_of(pair), input = input_of(pair);
    const int64_t rows = std::min(kWide, layer_.outputs - output),
                  columns = std::min(kWide, layer_.inputs - input);
    bool finite = true;
    for (int64_t o = 0; o < rows; ++o) {
      finite &=
          tile_kernels()->interleave(sums + o * kWide, kWide * kWide, positions_.taps, columns,
                                     grad_weight_ + ((output + o) * layer_.inputs + input) * positions_.taps);
    }
    return finite;
  }

  const TiledLayer layer_;
  const Positions positions_;
  const int64_t images_, groups_, steps_, row_, outputs_, inputs_;
  const BFloat16* const grad_;
  const BFloat16* const x_;
  BFloat16* const grad_weight_;
  std::vector<BFloat16> grads_;  // [groups, outputs, row]
  std::vector<uint32_t> pairs_;  // [groups, pairs of positions, inputs]
};

}  // namespace

bool has_tiles() { return tile_kernels() != nullptr; }

bool tiled_convolution(const TiledLayer& s, const BFloat16* x, const BFloat16* weight, const BFloat16* bias,
                       BFloat16* y) {
  const int64_t threads = threads_for(s);
  const auto blocks = weight_blocks(weight, s.outputs, s.inputs, s.kernel * s.kernel, threads);
  return Convolution(s, x, blocks, bias, y).compute(threads);
}

bool tiled_grad_input(const TiledLayer& s, const BFloat16* grad, const BFloat16* weight, BFloat16* grad_x) {
  const int64_t threads = threads_for(s);
  const auto blocks = turned_blocks(weight, s.outputs, s.inputs, s.kernel * s.kernel, threads);
  const TiledLayer turned = {s.images, s.outputs, s.inputs, s.height, s.width, s.kernel};
  return Convolution(turned, grad, blocks, nullptr, grad_x).compute(threads);
}

bool tiled_grad_weight(const TiledLayer& s, const BFloat16* grad, const BFloat16* x, BFloat16* grad_weight) {
  return WeightGradient(s, grad, x, grad_weight).compute(threads_for(s));
}

}  // namespace fastquant
