#include "winograd.h"

#include <atomic>
#include <memory>

#include "arrays.h"

namespace fastquant {
namespace {

constexpr int64_t kProducts = kWinogradProducts, kPanel = kWinogradPanel, kTaps = 9;

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that is not initialized.
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new float[size]) {}
  float* data() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

// The distance between matrices of so many elements. A cache line more than they need, because lines a power of
// two apart would take the same places of a cache.
int64_t matrix_stride(int64_t size) { return size + kPositionUnit; }

// Some rows of the tiles of an image.
struct Strip {
  int64_t image, first, last;

  int64_t rows() const { return last - first; }
};

// The tiles of all images, in strips, of which a block of some is computed at once.
class Tiles {
 public:
  Tiles(const WinogradLayer& layer, int64_t at_once)
      : across((layer.width + 1) / 2),
        down_((layer.height + 1) / 2),
        strips_of_image_(rounded_up(down_, most_rows(at_once)) / most_rows(at_once)),
        strips_(layer.images * strips_of_image_),
        strips_at_once_(std::max<int64_t>(at_once / (most_rows(at_once) * across), 1)) {}

  int64_t blocks() const { return (strips_ + strips_at_once_ - 1) / strips_at_once_; }

  // The most tiles that a block, and rows that a strip, has.
  int64_t at_once() const { return strips_at_once_ * rows_at_once() * across; }
  int64_t rows_at_once() const { return (down_ + strips_of_image_ - 1) / strips_of_image_; }

  // Calls f(strip, the number of its first tile in the block).
  template <class F>
  int64_t for_strips(int64_t block, const F& f) const {
    int64_t tile = 0;
    const int64_t end = std::min((block + 1) * strips_at_once_, strips_);
    for (int64_t s = block * strips_at_once_; s < end; ++s) {
      const int64_t i = s % strips_of_image_;
      const Strip strip = {s / strips_of_image_, down_ * i / strips_of_image_,
                           down_ * (i + 1) / strips_of_image_};
      f(strip, tile);
      tile += strip.rows() * across;
    }
    return tile;
  }

  const int64_t across;

 private:
  int64_t most_rows(int64_t at_once) const { return std::clamp<int64_t>(at_once / across, 1, down_); }

  const int64_t down_, strips_of_image_, strips_, strips_at_once_;
};

// Some channels of images.
struct Images {
  int64_t all_channels, first, channels, height, width;
  bool channels_last;

  int64_t padded() const { return rounded_up(channels, kPositionUnit); }

  // Where a row of an image begins.
  int64_t at(int64_t image, int64_t row) const {
    const int64_t begin = image * all_channels * height * width;
    return begin + (channels_last ? row * width * all_channels + first : (first * height + row) * width);
  }
};

// Rows of an image as pixels of channels. Pixels outside of it are zeros.
class Pixels {
 public:
  Pixels(const Images& images, int64_t most_rows)
      : channels_(images.padded()),
        memory_(((most_rows * images.width) + 1) * channels_),
        zeros_(memory_.data()),
        data_(zeros_ + channels_) {
    std::fill_n(zeros_, (most_rows * images.width + 1) * channels_, 0.0f);
  }

  // Reads the rows [begin, end) of x, as far as there are such.
  void read(const Images& images, const float* x, int64_t image, int64_t begin, int64_t end) {
    begin_ = std::max<int64_t>(begin, 0), end_ = std::min(end, images.height), width_ = images.width;
    const float* const from = x + images.at(image, begin_);
    const int64_t count = (end_ - begin_) * width_;
    if (!images.channels_last) {
      kernels().winograd.transpose(from, images.height * width_, images.channels, count, data_, channels_);
      return;
    }
    for (int64_t p = 0; p < count; ++p) {
      std::copy_n(from + p * images.all_channels, images.channels, data_ + p * channels_);
    }
  }

  // Prepares for writing pixels of the rows [begin, end).
  void begin(const Images& images, int64_t begin, int64_t end) {
    begin_ = begin, end_ = end, width_ = images.width;
  }

  void write(const Images& images, float* y, int64_t image) const {
    float* const to = y + images.at(image, begin_);
    const int64_t count = (end_ - begin_) * width_;
    if (!images.channels_last) {
      kernels().winograd.transpose(data_, channels_, count, images.channels, to, images.height * width_);
      return;
    }
    for (int64_t p = 0; p < count; ++p) {
      std::copy_n(data_ + p * channels_, images.channels, to + p * images.all_channels);
    }
  }

  // The size * size pixels from a row and a column on. Those outside of the rows share memory.
  template <class T>
  void square(int64_t row, int64_t column, int64_t size, T* pixels) const {
    for (int64_t r = row; r < row + size; ++r) {
      float* const first = data_ + ((r - begin_) * width_ + column) * channels_;
      for (int64_t c = 0; c < size; ++c, ++pixels) {
        const bool inside = r >= begin_ && r < end_ && column + c >= 0 && column + c < width_;
        *pixels = inside ? first + c * channels_ : zeros_;
      }
    }
  }

 private:
  int64_t channels_, begin_ = 0, end_ = 0, width_ = 0;
  Scratch memory_;
  float *zeros_, *data_;
};

// Transforms the pixels that the tiles of a strip depend on. `to` is where the first tile's are written to.
void transform_inputs(const Images& images, const float* x, const Strip& strip, int64_t across, Pixels* pixels,
                      float* to, int64_t tile_stride, int64_t apart, int64_t panel_stride) {
  pixels->read(images, x, strip.image, 2 * strip.first - 1, 2 * strip.last + 1);
  const int64_t channels = images.padded();
  for (int64_t i = strip.first; i < strip.last; ++i) {
    for (int64_t j = 0; j < across; ++j, to += tile_stride) {
      const float* of_tile[16];
      pixels->square(2 * i - 1, 2 * j - 1, 4, of_tile);
      kernels().winograd.input(of_tile, channels, to, apart, panel_stride);
    }
  }
}

// The same for the gradients of the tiles' outputs.
void transform_gradients(const Images& images, const float* grad, const Strip& strip, int64_t across,
                         Pixels* pixels, float* to, int64_t tile_stride, int64_t apart) {
  pixels->read(images, grad, strip.image, 2 * strip.first, 2 * strip.last);
  const int64_t channels = images.padded();
  for (int64_t i = strip.first; i < strip.last; ++i) {
    for (int64_t j = 0; j < across; ++j, to += tile_stride) {
      const float* of_tile[4];
      pixels->square(2 * i, 2 * j, 2, of_tile);
      kernels().winograd.gradient(of_tile, channels, to, apart);
    }
  }
}

// A product of matrices whose columns are a panel, or its first half.
PointwiseProduct<float> panel_product(const float* x, int64_t inner, int64_t outer, float* y) {
  PointwiseProduct<float> p = {};
  p.x = x, p.y = y, p.images = 1, p.inner = inner, p.outer = outer, p.positions = kPanel;
  p.units = {kPanel / kPositionUnit, kPanel / kPositionUnit, 0, 1, 0};
  p.units_at_once = p.units.in_image;
  return p;
}

void multiply(const PointwiseProduct<float>& p, int64_t columns) {
  const int64_t units = columns > kPositionUnit ? 2 : 1;
  kernels().pointwise_f32.product(p, 0, p.outer, 0, units, nullptr);
}

int64_t threads_for(const WinogradLayer& s) {
  constexpr int64_t kProductsOfThread = 32 * kGrain;  // that take the time that starting a thread does
  return piece_count(s.images * s.inputs * s.outputs * s.height * s.width * 4, kProductsOfThread);
}

// Convolves images with weights, block by block, on one thread.
class Convolution {
 public:
  // `transformed`: all weights; null where they are transformed panel by panel.
  Convolution(const WinogradLayer& layer, const Tiles& tiles, const float* x, const WinogradWeights& weights,
              const float* transformed, const float* bias, float* y)
      : tiles_(tiles),
        weights_(weights),
        transformed_(transformed),
        bias_(bias),
        x_(x),
        y_(y),
        images_{weights.inputs, 0, weights.inputs, layer.height, layer.width, layer.channels_last},
        outputs_{weights.outputs, 0, kPanel, layer.height, layer.width, layer.channels_last},
        channels_(images_.padded()),
        apart_(matrix_stride(tiles.at_once() * channels_)),
        apart_of_products_(matrix_stride(tiles.at_once() * kPanel)),
        inputs_(kProducts * apart_),
        products_(kProducts * apart_of_products_),
        panel_(transformed == nullptr ? panel_size(weights) : 0),
        read_(images_, 2 * tiles.rows_at_once() + 2),
        written_(outputs_, 2 * tiles.rows_at_once()) {}

  static int64_t panel_size(const WinogradWeights& w) { return kProducts * w.inputs * kPanel; }

  // Computes the panels [first, last) of a block. Returns whether all is finite.
  bool compute(int64_t block, int64_t first, int64_t last) {
    const int64_t count = tiles_.for_strips(block, [&](const Strip& strip, int64_t tile) {
      transform_inputs(images_, x_, strip, tiles_.across, &read_, inputs_.data() + tile * channels_, channels_,
                       apart_, kPanel);
    });
    bool finite = true;
    for (int64_t panel = first; panel < last; ++panel) {
      outputs_.first = panel * kPanel, outputs_.channels = std::min(kPanel, weights_.outputs - outputs_.first);
      multiply_panel(panel, count);
      tiles_.for_strips(block, [&](const Strip& strip, int64_t tile) { finite &= write(strip, tile); });
    }
    return finite;
  }

 private:
  void multiply_panel(int64_t panel, int64_t count) {
    // Long sums of rounded products are less precise than sums of short ones.
    constexpr int64_t kLongest = 64;
    if (transformed_ == nullptr) kernels().winograd.weights(weights_, panel * kPanel, panel_.data());
    const float* u = transformed_ == nullptr ? panel_.data() : transformed_ + panel * panel_size(weights_);
    for (int64_t e = 0; e < kProducts; ++e) {
      for (int64_t c = 0; c < weights_.inputs; c += kLongest) {
        const int64_t inner = std::min(kLongest, weights_.inputs - c);
        PointwiseProduct<float> p = panel_product(u, inner, count, products_.data() + e * apart_of_products_);
        p.weight = inputs_.data() + e * apart_ + c, p.weight_outer_stride = channels_,
        p.weight_inner_stride = 1;
        p.adds = c > 0;
        multiply(p, outputs_.channels);
        u += inner * kPanel;
      }
    }
  }

  // Writes the outputs of a strip, whose first tile is `tile`. Returns whether all are finite.
  bool write(const Strip& strip, int64_t tile) {
    written_.begin(outputs_, 2 * strip.first, std::min(2 * strip.last, outputs_.height));
    const float* const bias = bias_ == nullptr ? nullptr : bias_ + outputs_.first;
    bool finite = true;
    for (int64_t i = strip.first; i < strip.last; ++i) {
      for (int64_t j = 0; j < tiles_.across; ++j, ++tile) {
        float* of_tile[4];
        written_.square(2 * i, 2 * j, 2, of_tile);
        finite &= kernels().winograd.output(products_.data() + tile * kPanel, apart_of_products_,
                                            outputs_.padded(), bias, of_tile);
      }
    }
    written_.write(outputs_, y_, strip.image);
    return finite;
  }

  const Tiles& tiles_;
  const WinogradWeights& weights_;
  const float *transformed_, *bias_, *x_;
  float* y_;
  const Images images_;
  Images outputs_;
  const int64_t channels_, apart_, apart_of_products_;
  const Scratch inputs_, products_, panel_;
  Pixels read_, written_;
};

// Convolves with weights. `layer` has the sizes of the images.
bool convolve(const WinogradLayer& layer, const float* x, const WinogradWeights& w, const float* bias,
              float* y) {
  // A block of so many tiles, and its products with a panel of weights, stay in the second cache. The weights
  // of layers with fewer tiles in all are most of what is read; so their panels are transformed one by one.
  constexpr int64_t kAtOnce = 64, kFew = 256;
  const bool few = layer.images * ((layer.height + 1) / 2) * ((layer.width + 1) / 2) <= kFew;
  const Tiles tiles(layer, few ? kFew : kAtOnce);
  const int64_t threads = threads_for(layer), panels = (w.outputs + kPanel - 1) / kPanel;
  const int64_t panel_size = Convolution::panel_size(w);
  const Scratch transformed(few ? 0 : panels * panel_size);
  if (!few) {
    for_pieces(panels, std::min(threads, panels), 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        kernels().winograd.weights(w, p * kPanel, transformed.data() + p * panel_size);
      }
    });
  }
  std::vector<float> padded_bias;
  if (bias != nullptr) {
    padded_bias.resize(panels * kPanel);
    std::copy_n(bias, w.outputs, padded_bias.data());
  }
  std::atomic<bool> finite{true};
  const int64_t items = few ? panels : tiles.blocks();
  for_pieces(items, std::min(threads, items), 1, [&](int64_t, int64_t begin, int64_t end) {
    if (begin >= end) return;
    Convolution convolution(layer, tiles, x, w, few ? nullptr : transformed.data(),
                            bias == nullptr ? nullptr : padded_bias.data(), y);
    bool all = true;
    if (few) {
      all = convolution.compute(0, begin, end);
    } else {
      for (int64_t block = begin; block < end; ++block) all &= convolution.compute(block, 0, panels);
    }
    if (!all) finite = false;
  });
  return finite;
}

// Sums the products of gradients and inputs over the tiles of the blocks [begin, end), for all outputs and the
// channels of x that `inputs` has: kProducts matrices of panels of inputs, [outputs][kPanel].
void sum_blocks(const Tiles& tiles, int64_t begin, int64_t end, const Images& inputs, const float* x,
                const Images& outputs, const float* grad, float* sums, int64_t apart_of_sums) {
  const int64_t rows = tiles.rows_at_once(), panel = tiles.at_once() * kPanel;
  const int64_t panels = (inputs.channels + kPanel - 1) / kPanel, apart = matrix_stride(panels * panel);
  const int64_t width = outputs.padded(), apart_of_gradients = matrix_stride(tiles.at_once() * width);
  const Scratch v(kProducts * apart), d(kProducts * apart_of_gradients);
  Pixels of_x(inputs, 2 * rows + 2), of_grad(outputs, 2 * rows);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t count = tiles.for_strips(block, [&](const Strip& strip, int64_t tile) {
      transform_inputs(inputs, x, strip, tiles.across, &of_x, v.data() + tile * kPanel, kPanel, apart, panel);
      transform_gradients(outputs, grad, strip, tiles.across, &of_grad, d.data() + tile * width, width,
                          apart_of_gradients);
    });
    for (int64_t e = 0; e < kProducts; ++e) {
      for (int64_t c = 0; c < panels; ++c) {
        PointwiseProduct<float> p = panel_product(v.data() + e * apart + c * panel, count, outputs.channels,
                                                  sums + e * apart_of_sums + c * outputs.channels * kPanel);
        p.weight = d.data() + e * apart_of_gradients, p.weight_outer_stride = 1, p.weight_inner_stride = width;
        p.adds = block > begin;
        multiply(p, std::min(kPanel, inputs.channels - c * kPanel));
      }
    }
  }
}

}  // namespace

bool winograd_convolution(const WinogradLayer& layer, const float* x, const float* weight, const float* bias,
                          float* y) {
  const int64_t of_output = layer.inputs * kTaps;
  return convolve(
      layer, x,
      {weight, weight + layer.outputs * of_output, layer.outputs, layer.inputs, of_output, kTaps, false}, bias,
      y);
}

bool winograd_grad_input(const WinogradLayer& layer, const float* grad, const float* weight, float* grad_x) {
  const int64_t of_output = layer.inputs * kTaps;
  return convolve(
      layer, grad,
      {weight, weight + layer.outputs * of_output, layer.inputs, layer.outputs, kTaps, of_output, true},
      nullptr, grad_x);
}

bool winograd_grad_weight(const WinogradLayer& layer, const float* grad, const float* x, float* grad_weight) {
  // More tiles at once take less time to add up, but their sums are less precise.
  constexpr int64_t kAtOnce = 128, kMostParts = 8, kSumsOfParts = int64_t{2} << 20;
  const Tiles tiles(layer, kAtOnce);
  const int64_t inputs = layer.inputs, outputs = layer.outputs, threads = threads_for(layer);
  const int64_t panels = (inputs + kPanel - 1) / kPanel, apart = matrix_stride(panels * outputs * kPanel);
  // Threads share parts of the tiles, and panels where parts are fewer. Results depend on the number of parts,
  // which therefore must not depend on threads.
  const int64_t parts =
      std::clamp<int64_t>(kSumsOfParts / (kProducts * apart), 1, std::min(kMostParts, tiles.blocks()));
  const int64_t splits = std::min((threads + parts - 1) / parts, panels), items = parts * splits;
  const Scratch sums(parts * kProducts * apart);
  for_pieces(items, std::min(threads, items), 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / splits, split = item % splits;
      const int64_t first = panels * split / splits, last = panels * (split + 1) / splits;
      const int64_t channels = std::min(last * kPanel, inputs) - first * kPanel;
      sum_blocks(tiles, tiles.blocks() * part / parts, tiles.blocks() * (part + 1) / parts,
                 {inputs, first * kPanel, channels, layer.height, layer.width, layer.channels_last}, x,
                 {outputs, 0, outputs, layer.height, layer.width, layer.channels_last}, grad,
                 sums.data() + part * kProducts * apart + first * outputs * kPanel, apart);
    }
  });
  std::atomic<bool> finite{true};
  for_pieces(outputs, std::min(threads, outputs), 1, [&](int64_t, int64_t begin, int64_t end) {
    float taps[kPositionUnit * (kTaps + 1)];
    bool all = true;
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < inputs; c += kPositionUnit) {
        const float* const from = sums.data() + (c / kPanel * outputs + o) * kPanel + c % kPanel;
        all &= kernels().winograd.weight_gradient(from, apart, parts, kProducts * apart, taps);
        std::copy_n(taps, std::min(kPositionUnit, inputs - c) * kTaps, grad_weight + (o * inputs + c) * kTaps);
      }
    }
    if (!all) finite = false;
  });
  return finite;
}

}  // namespace fastquant
