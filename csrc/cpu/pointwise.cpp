#include "pointwise.h"

#include <type_traits>

#include "widened.h"

namespace fastquant {
namespace {

// So many products take the time that starting a thread does.
constexpr int64_t kProductsOfThread = 32 * kGrain;

int64_t threads_for(const Pointwise& s) {
  return piece_count(s.images * s.positions * s.inputs * s.outputs, kProductsOfThread);
}

PositionUnits position_units(int64_t images, int64_t positions) {
  PositionUnits units;
  units.in_image = positions / kPositionUnit;
  units.in_images = images * units.in_image;
  units.left = positions % kPositionUnit;
  units.images_of_shared = units.left == 0 ? 1 : kPositionUnit / units.left;
  units.shared = units.left == 0 ? 0 : (images + units.images_of_shared - 1) / units.images_of_shared;
  return units;
}

const PointwiseKernels<float>& pointwise_kernels(float) { return kernels().pointwise_f32; }
const PointwiseKernels<BFloat16>& pointwise_kernels(BFloat16) { return kernels().pointwise_bf16; }

// Sets what follows from the sizes: the units, and how many of them to compute at once.
template <class S>
void plan(PointwiseProduct<S>* p) {
  constexpr int64_t kCached = int64_t{96} << 10;  // elements, in the second cache
  p->units = position_units(p->images, p->positions);
  // Two units make a tile.
  p->units_at_once = std::max<int64_t>(kCached / (p->inner * kPositionUnit) / 2, 1) * 2;
}

template <class S>
int64_t scratch_size(const PointwiseProduct<S>& p) {
  return std::min(p.units.shared, p.units_at_once) * p.inner * kPositionUnit;
}

// Computes a product with `threads` threads. They share the larger of its factors.
template <class S>
void multiply(PointwiseProduct<S> p, int64_t threads) {
  plan(&p);
  const int64_t units = p.units.in_images + p.units.shared;
  const bool by_rows = p.outer > units * kPositionUnit;
  for_pieces(by_rows ? p.outer : units, threads, by_rows ? 1 : 2, [&](int64_t, int64_t begin, int64_t end) {
    if (begin >= end) return;
    std::vector<S> scratch(scratch_size(p));
    const auto product = pointwise_kernels(S{}).product;
    if (by_rows) {
      product(p, begin, end, 0, units, scratch.data());
    } else {
      product(p, 0, p.outer, begin, end, scratch.data());
    }
  });
}

// A grid of threads for a matrix of so many rows and units of columns.
struct Grid {
  int64_t down, across;
};

// Threads of one row of the grid do the same to rows, those of one column the same to columns, which takes as
// long as multiplying `shared` more rows. Two units make a tile.
Grid grid_of(int64_t rows, int64_t units, int64_t threads, int64_t shared) {
  Grid best = {1, 1};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t across = 1; across <= std::min(threads, (units + 1) / 2); ++across) {
    const int64_t down = std::min(threads / across, rows);
    const int64_t time = ((units + 1) / 2 + across - 1) / across * ((rows + down - 1) / down + shared);
    if (time < least) best = {down, across}, least = time;
  }
  return best;
}

// Calls f(top, bottom, begin, end) for the parts of a grid: rows [top, bottom) and units [begin, end).
template <class F>
void for_grid(int64_t rows, int64_t units, const Grid& grid, const F& f) {
  const int64_t pairs = (units + 1) / 2;
  for_pieces(grid.down * grid.across, grid.down * grid.across, 1, [&](int64_t piece, int64_t, int64_t) {
    const int64_t i = piece / grid.across, j = piece % grid.across;
    f(rows * i / grid.down, rows * (i + 1) / grid.down, pairs * j / grid.across * 2,
      std::min(pairs * (j + 1) / grid.across * 2, units));
  });
}

// y[r, c] = the sum over n and p of a[n, r, p] b[n, c, p], for a and b of so many channels: products of a and
// the transposed images of b, one image after the other.
template <class S>
void multiply_images(const S* a, int64_t rows, const S* b, int64_t columns, const Pointwise& s, float* y,
                     int64_t threads) {
  constexpr int64_t kTransposing = 16;
  std::fill_n(y, rows * columns, 0.0f);
  const int64_t units = (columns + kPositionUnit - 1) / kPositionUnit;
  const auto add_images = [&](int64_t top, int64_t bottom, int64_t begin, int64_t end) {
    const int64_t first = begin * kPositionUnit, last = std::min(end * kPositionUnit, columns);
    std::vector<float> transposed(s.positions * columns), scratch;
    for (int64_t n = 0; n < s.images; ++n) {
      pointwise_kernels(S{}).transpose(b + (n * columns + first) * s.positions, last - first, s.positions,
                                       transposed.data() + first, columns);
      const Widened weight(a + (n * rows + top) * s.positions, (bottom - top) * s.positions);
      PointwiseProduct<float> p = {};
      p.x = transposed.data(), p.weight = weight.data(), p.y = y + top * columns, p.adds = true;
      p.images = 1, p.inner = s.positions, p.outer = bottom - top, p.positions = columns;
      p.weight_outer_stride = s.positions, p.weight_inner_stride = 1;
      plan(&p);
      scratch.resize(scratch_size(p));
      kernels().pointwise_f32.product(p, 0, p.outer, begin, end, scratch.data());
    }
  };
  for_grid(rows, units, grid_of(rows, units, threads, kTransposing), add_images);
}

// Adds up `parts` arrays of `size` numbers.
template <class T>
void add_parts(const std::vector<T>& values, int64_t parts, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(values[part * size + i]);
    y[i] = static_cast<float>(sum);
  }
}

// How many parts to cut a sum over n images into. It must not depend on threads, so that results do not.
int64_t parts_of(int64_t n, int64_t blocks) {
  constexpr int64_t kItems = 8;
  return std::min(n, (kItems + blocks - 1) / blocks);
}

// The gradient of the weight in channels_last, where images are transposed already.
void multiply_channels_last(const float* grad, const float* x, const Pointwise& s, float* grad_weight,
                            int64_t threads) {
  constexpr int64_t kCached = int64_t{64} << 10;  // elements, in the second cache
  const int64_t size = s.outputs * s.inputs, units = (s.inputs + kPositionUnit - 1) / kPositionUnit;
  // Few weights do not suffice for all threads, and are those of large images.
  const int64_t parts = size <= kCached ? parts_of(s.images, 1) : 1;
  const int64_t at_once = std::max<int64_t>(kCached / (s.inputs + s.outputs), 1);
  std::vector<float> sums(parts * size);
  const auto add_images = [&](int64_t part, int64_t top, int64_t bottom, int64_t begin, int64_t end) {
    std::vector<float> scratch;
    const int64_t last = s.images * (part + 1) / parts * s.positions;
    for (int64_t i = s.images * part / parts * s.positions; i < last; i += at_once) {
      PointwiseProduct<float> p = {};
      p.x = x + i * s.inputs, p.weight = grad + i * s.outputs, p.y = sums.data() + part * size, p.adds = true;
      p.images = 1, p.inner = std::min(at_once, last - i), p.outer = s.outputs, p.positions = s.inputs;
      p.weight_outer_stride = 1, p.weight_inner_stride = s.outputs;
      plan(&p);
      scratch.resize(scratch_size(p));
      kernels().pointwise_f32.product(p, top, bottom, begin, end, scratch.data());
    }
  };
  if (parts > 1) {
    for_pieces(parts, std::min(parts, threads), 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) add_images(part, 0, s.outputs, 0, units);
    });
  } else {
    for_grid(s.outputs, units, grid_of(s.outputs, units, threads, 0),
             [&](int64_t top, int64_t bottom, int64_t begin, int64_t end) {
               add_images(0, top, bottom, begin, end);
             });
  }
  add_parts(sums, parts, size, grad_weight);
}

// The positions of each image that are left over by whole units, as one image of whole units.
template <class S>
std::vector<S> shared_positions(const S* x, int64_t channels, const Pointwise& s, const PositionUnits& units) {
  const int64_t columns = units.shared * kPositionUnit;
  std::vector<S> shared(channels * columns);
  for (int64_t n = 0; units.left > 0 && n < s.images; ++n) {
    const int64_t at = n / units.images_of_shared * kPositionUnit + n % units.images_of_shared * units.left;
    for (int64_t c = 0; c < channels; ++c) {
      std::copy_n(x + (n * channels + c) * s.positions + units.in_image * kPositionUnit, units.left,
                  shared.data() + c * columns + at);
    }
  }
  return shared;
}

// Sums over positions of the products of `height` rows with `width` others. They are fp32 for a bounded number
// of positions, so that the gradients of large batches are as precise as those of small ones.
template <class S>
class SumsOfProducts {
 public:
  // Sums are added to `into`, whose rows begin `stride` elements apart.
  SumsOfProducts(int64_t height, int64_t width, double* into, int64_t stride)
      : height_(height),
        width_(width),
        stride_(stride),
        into_(into),
        sums_(height * width * kPositionUnit),
        totals_(width) {}

  // Adds the products at the first `count` positions of rows that begin `stride` elements apart.
  void add(const S* a, const S* b, int64_t stride, int64_t count) {
    constexpr int64_t kLongest = 1024 * kPositionUnit;
    for (int64_t p = 0; p < count; p += kLongest) {
      const int64_t n = std::min(kLongest, count - p);
      if (summed_ + n > kLongest) finish();
      pointwise_kernels(S{}).dots(a + p, height_, b + p, width_, stride, n, sums_.data());
      summed_ += n;
    }
  }

  // To be called after the last products.
  void finish() {
    for (int64_t r = 0; r < height_; ++r) {
      kernels().sum_units(sums_.data() + r * width_ * kPositionUnit, width_, totals_.data());
      for (int64_t c = 0; c < width_; ++c) into_[r * stride_ + c] += static_cast<double>(totals_[c]);
    }
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    summed_ = 0;
  }

 private:
  int64_t height_, width_, stride_, summed_ = 0;  // positions
  double* into_;
  std::vector<float> sums_, totals_;
};

// The gradient of the weight by sums over positions, for large images of few channels: blocks of pairs of
// channels, each for some of the images, whose sums are then added up.
template <class S>
void sum_over_positions(const Pointwise& s, const S* grad, const S* x, float* grad_weight, int64_t threads) {
  constexpr int64_t kBlock = 64;
  const PositionUnits units = position_units(s.images, s.positions);
  const int64_t whole = units.in_image * kPositionUnit, columns = units.shared * kPositionUnit;
  const std::vector<S> shared_grad = shared_positions(grad, s.outputs, s, units);
  const std::vector<S> shared_x = shared_positions(x, s.inputs, s, units);
  const int64_t down = (s.outputs + kBlock - 1) / kBlock, across = (s.inputs + kBlock - 1) / kBlock;
  const int64_t blocks = down * across, size = s.outputs * s.inputs;
  const int64_t parts = parts_of(s.images, blocks);
  std::vector<double> sums_of_parts(parts * size);
  for_pieces(parts * blocks, threads, 1, [&](int64_t, int64_t first_item, int64_t last_item) {
    for (int64_t item = first_item; item < last_item; ++item) {
      const int64_t part = item / blocks, block = item % blocks, i = block / across, j = block % across;
      const int64_t top = s.outputs * i / down, height = s.outputs * (i + 1) / down - top;
      const int64_t left = s.inputs * j / across, width = s.inputs * (j + 1) / across - left;
      double* const into = sums_of_parts.data() + part * size + top * s.inputs + left;
      SumsOfProducts<S> sums(height, width, into, s.inputs);
      for (int64_t n = s.images * part / parts; n < s.images * (part + 1) / parts; ++n) {
        sums.add(grad + (n * s.outputs + top) * s.positions, x + (n * s.inputs + left) * s.positions,
                 s.positions, whole);
      }
      if (part == parts - 1) {
        sums.add(shared_grad.data() + top * columns, shared_x.data() + left * columns, columns, columns);
      }
      sums.finish();
    }
  });
  add_parts(sums_of_parts, parts, size, grad_weight);
}

template <class S>
void sum_grad_weight(const Pointwise& s, const S* grad, const S* x, float* grad_weight, int64_t threads) {
  // Transposing an image pays off where its transpose stays in the cache.
  constexpr int64_t kLargestTransposed = 28 * 28;
  if (s.positions > kLargestTransposed) return sum_over_positions(s, grad, x, grad_weight, threads);
  if (s.outputs >= s.inputs) return multiply_images(grad, s.outputs, x, s.inputs, s, grad_weight, threads);
  std::vector<float> transposed(s.inputs * s.outputs);
  multiply_images(x, s.inputs, grad, s.outputs, s, transposed.data(), threads);
  for_pieces(s.inputs, threads, kPositionUnit, [&](int64_t, int64_t begin, int64_t end) {
    if (begin >= end) return;
    kernels().pointwise_f32.transpose(transposed.data() + begin * s.outputs, end - begin, s.outputs,
                                      grad_weight + begin, s.inputs);
  });
}

// x and y are [positions, channels] here: x is the weight of a product with the layer's weight, [inputs,
// outputs].
void multiply_positions(const Pointwise& s, const float* x, int64_t inputs, const float* weight,
                        const float* bias, int64_t outputs, float* y, int64_t threads) {
  const int64_t rows = s.images * s.positions;
  for (int64_t r = 0; bias != nullptr && r < rows; ++r) std::copy_n(bias, outputs, y + r * outputs);
  PointwiseProduct<float> p = {};
  p.x = weight, p.weight = x, p.y = y, p.adds = bias != nullptr;
  p.images = 1, p.inner = inputs, p.outer = rows, p.positions = outputs;
  p.weight_outer_stride = inputs, p.weight_inner_stride = 1;
  multiply(p, threads);
}

}  // namespace

template <class S>
void pointwise_convolution(const Pointwise& s, const S* x, const S* weight, const S* bias, S* y) {
  const Widened weights(weight, s.outputs * s.inputs), biases(bias, s.outputs);
  PointwiseProduct<S> p = {};
  p.x = x, p.weight = weights.data(), p.bias = biases.data(), p.y = y;
  p.images = s.images, p.inner = s.inputs, p.outer = s.outputs, p.positions = s.positions;
  p.weight_outer_stride = s.inputs, p.weight_inner_stride = 1;
  multiply(p, threads_for(s));
}

template <class S>
void pointwise_grad_input(const Pointwise& s, const S* grad, const S* weight, S* grad_x) {
  const Widened weights(weight, s.outputs * s.inputs);
  PointwiseProduct<S> p = {};
  p.x = grad, p.weight = weights.data(), p.y = grad_x;
  p.images = s.images, p.inner = s.outputs, p.outer = s.inputs, p.positions = s.positions;
  p.weight_outer_stride = 1, p.weight_inner_stride = s.inputs;
  multiply(p, threads_for(s));
}

template <class S>
void pointwise_grad_weight(const Pointwise& s, const S* grad, const S* x, S* grad_weight) {
  if constexpr (std::is_same_v<S, float>) {
    sum_grad_weight(s, grad, x, grad_weight, threads_for(s));
  } else {
    std::vector<float> sums(s.outputs * s.inputs);
    sum_grad_weight(s, grad, x, sums.data(), threads_for(s));
    for (size_t i = 0; i < sums.size(); ++i) from_compute(grad_weight + i, sums[i]);
  }
}

template void pointwise_convolution(const Pointwise&, const float*, const float*, const float*, float*);
template void pointwise_convolution(const Pointwise&, const BFloat16*, const BFloat16*, const BFloat16*,
                                    BFloat16*);
template void pointwise_grad_input(const Pointwise&, const float*, const float*, float*);
template void pointwise_grad_input(const Pointwise&, const BFloat16*, const BFloat16*, BFloat16*);
template void pointwise_grad_weight(const Pointwise&, const float*, const float*, float*);
template void pointwise_grad_weight(const Pointwise&, const BFloat16*, const BFloat16*, BFloat16*);

void pointwise_convolution_channels_last(const Pointwise& s, const float* x, const float* weight,
                                         const float* bias, float* y) {
  std::vector<float> transposed(s.inputs * s.outputs);
  kernels().pointwise_f32.transpose(weight, s.outputs, s.inputs, transposed.data(), s.outputs);
  multiply_positions(s, x, s.inputs, transposed.data(), bias, s.outputs, y, threads_for(s));
}

void pointwise_grad_input_channels_last(const Pointwise& s, const float* grad, const float* weight,
                                        float* grad_x) {
  multiply_positions(s, grad, s.outputs, weight, nullptr, s.inputs, grad_x, threads_for(s));
}

void pointwise_grad_weight_channels_last(const Pointwise& s, const float* grad, const float* x,
                                         float* grad_weight) {
  multiply_channels_last(grad, x, s, grad_weight, threads_for(s));
}

}  // namespace fastquant
