// Registers the CPU implementations of pooling, means and interpolation of quantized tensors.
#include <torch/csrc/stable/library.h>

#include "elementwise.h"
#include "interpolation.h"
#include "pooling.h"
#include "quantized_tensors.h"

namespace fastquant {
namespace {

// ---------------------------------------------------------------------------- pooling

// The sizes of a tensor as [images, channels, depth, height, width].
struct PoolSizes {
  int64_t images, channels, spatial[kPoolDims];

  int64_t pixels() const { return spatial[0] * spatial[1] * spatial[2]; }
};

// A tensor that is pooled along its last `dims` dimensions, with or without one of images before its channels.
struct PoolInput {
  PoolInput(const Tensor& tensor, size_t dims_) : x(tensor), dims(static_cast<int64_t>(dims_)) {
    check(dims >= 1 && dims <= kPoolDims, "pooling is along 1 to 3 dimensions");
    check(x.dim() == dims + 1 || x.dim() == dims + 2, "x must have ", dims + 1, " or ", dims + 2,
          " dimensions, got ", x.dim());
    batched = x.dim() == dims + 2;
    sizes.images = batched ? x.size(0) : 1;
    sizes.channels = x.size(batched);
    for (int k = 0; k < kPoolDims; ++k) {
      const int64_t d = x.dim() - kPoolDims + k;
      sizes.spatial[k] = d > batched ? x.size(d) : 1;
    }
  }

  // Calls pool(images), where x has its channels next to each other, maybe in a copy.
  template <class F>
  void with_images(const F& pool) const {
    Images images = {bytes(x), sizes.images, sizes.channels, 0, {}, is_int8(x.scalar_type())};
    if (sizes.channels <= 1 || x.stride(batched) == 1) {
      images.image_stride = batched ? x.stride(0) : 0;
      for (int k = 0; k < kPoolDims; ++k) {
        const int64_t d = x.dim() - kPoolDims + k;
        images.strides[k] = d > batched ? x.stride(d) : 0;
      }
      pool(images);
      return;
    }
    const Tensor t = torch::stable::contiguous(x);
    Tensor copy = empty_1d(x.numel(), ScalarType::Byte, x);
    transpose(bytes(t), sizes.images, sizes.channels, sizes.pixels(), bytes(copy));
    images.data = bytes(copy);
    int64_t stride = sizes.channels;
    for (int k = kPoolDims; k-- > 0; stride *= sizes.spatial[k]) images.strides[k] = stride;
    images.image_stride = stride;
    pool(images);
  }

  const Tensor x;
  int64_t dims;
  bool batched;
  PoolSizes sizes;
};

// The result of pooling to these spatial sizes, channels last or contiguous: pool(images, out) writes it
// channel by channel.
template <class F>
Tensor pooled(const PoolInput& input, const int64_t (&spatial)[kPoolDims], bool channels_last, const F& pool) {
  const int64_t channels = input.sizes.channels, pixels = spatial[0] * spatial[1] * spatial[2];
  Shape sizes = sizes_of(input.x);
  for (int k = 0; k < kPoolDims; ++k) {
    const int64_t d = input.x.dim() - kPoolDims + k;
    if (d > input.batched) sizes[d] = spatial[k];
  }
  Tensor y = empty(sizes, channels_last ? channels_last_strides(sizes) : contiguous_strides(sizes),
                   input.x.scalar_type(), input.x);
  if (y.numel() == 0) return y;
  input.with_images([&](const Images& images) {
    if (channels_last || channels == 1 || pixels == 1) {
      pool(images, bytes(y));
      return;
    }
    Tensor transposed = empty_1d(y.numel(), ScalarType::Byte, y);
    pool(images, bytes(transposed));
    transpose(bytes(transposed), input.sizes.images, pixels, channels, bytes(y));
  });
  return y;
}

template <class F>
Tensor pooled_by(const PoolInput& input, const Windows (&windows)[kPoolDims], const F& pool) {
  int64_t spatial[kPoolDims];
  for (int k = 0; k < kPoolDims; ++k) spatial[k] = static_cast<int64_t>(windows[k].begin.size());
  return pooled(input, spatial, input.batched, pool);
}

// The values of a list of one number for each spatial dimension, or one for all, as the last of kPoolDims.
int64_t of_dim(const Shape& values, int64_t dims, int k, int64_t otherwise, const char* name) {
  check(static_cast<int64_t>(values.size()) == dims, name, " must have ", dims, " elements");
  const int64_t at = k - (kPoolDims - dims);
  return at < 0 ? otherwise : values[at];
}

struct Sliding {
  const Shape &kernel, &stride, &padding, &dilation;
  bool ceil_mode, count_padding;
};

template <class F>
Tensor slide(const PoolInput& input, const Sliding& s, const F& pool) {
  Windows windows[kPoolDims];
  for (int k = 0; k < kPoolDims; ++k) {
    windows[k] = sliding_windows(
        input.sizes.spatial[k], of_dim(s.kernel, input.dims, k, 1, "kernel_size"),
        of_dim(s.stride, input.dims, k, 1, "stride"), of_dim(s.padding, input.dims, k, 0, "padding"),
        of_dim(s.dilation, input.dims, k, 1, "dilation"), s.ceil_mode, s.count_padding);
  }
  return pooled_by(input, windows, [&](const Images& images, uint8_t* out) { pool(images, windows, out); });
}

Tensor max_pool_op(const Tensor x, const Shape kernel_size, const Shape stride, const Shape padding,
                   const Shape dilation, bool ceil_mode) {
  const PoolInput input(x, kernel_size.size());
  return slide(input, {kernel_size, stride, padding, dilation, ceil_mode, false},
               [](const Images& images, const auto& windows, uint8_t* out) { max_pool(images, windows, out); });
}

Tensor avg_pool_op(const Tensor x, int64_t x_zero_point, const Shape kernel_size, const Shape stride,
                   const Shape padding, bool ceil_mode, bool count_include_pad,
                   std::optional<int64_t> divisor_override) {
  check(divisor_override.value_or(1) != 0, "divisor_override must not be 0");
  const PoolInput input(x, kernel_size.size());
  const Shape dilation(kernel_size.size(), 1);
  return slide(input, {kernel_size, stride, padding, dilation, ceil_mode, count_include_pad},
               [&](const Images& images, const auto& windows, uint8_t* out) {
                 average_pool(images, x_zero_point, windows, divisor_override, out);
               });
}

Tensor adaptive_avg_pool_op(const Tensor x, const Shape output_size) {
  const PoolInput input(x, output_size.size());
  Windows windows[kPoolDims];
  for (int k = 0; k < kPoolDims; ++k) {
    const int64_t outputs = of_dim(output_size, input.dims, k, 1, "output_size");
    check(outputs >= 0, "output_size must not be negative, got ", outputs);
    check(input.sizes.spatial[k] > 0, "x must not be empty");
    windows[k] = adaptive_windows(input.sizes.spatial[k], outputs);
  }
  const int64_t zero_point = is_int8(x.scalar_type()) ? -128 : 0;
  return pooled_by(input, windows, [&](const Images& images, uint8_t* out) {
    average_pool(images, zero_point, windows, std::nullopt, out);
  });
}

// ------------------------------------------------------------------------------- mean

// A run of neighbouring dimensions, in the order of memory, that are all reduced or all kept.
struct Run {
  bool reduced;
  int64_t size;
};

// The runs of a tensor without gaps; nothing if the kept dimensions lie in memory in another order.
std::optional<std::vector<Run>> runs_of(const Tensor& x, const std::vector<bool>& reduced) {
  Shape order = in_order(static_cast<size_t>(x.dim()));
  order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t d) { return x.size(d) == 1; }),
              order.end());
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  std::vector<Run> runs;
  int64_t last_kept = -1;
  for (int64_t d : order) {
    if (!reduced[d]) {
      if (d < last_kept) return std::nullopt;
      last_kept = d;
    }
    if (runs.empty() || runs.back().reduced != reduced[d]) runs.push_back({reduced[d], 1});
    runs.back().size *= x.size(d);
  }
  return runs;
}

// The mean over the middle of [outer, n, inner]. Returns false where that is too much for this way.
bool mean_of_columns(const uint8_t* x, int64_t outer, int64_t n, int64_t inner, bool is_signed, uint8_t* out) {
  if (n > (int64_t{1} << 23)) return false;
  const Images images = {x, outer, inner, n * inner, {0, 0, inner}, is_signed};
  const Windows windows[] = {adaptive_windows(1, 1), adaptive_windows(1, 1), adaptive_windows(n, 1)};
  average_pool(images, is_signed ? -128 : 0, windows, std::nullopt, out);
  return true;
}

Tensor mean_op(const Tensor x, const Shape dim, bool keepdim) {
  const bool is_signed = is_int8(x.scalar_type());
  const int64_t dims = x.dim();
  std::vector<bool> reduced(static_cast<size_t>(dims), dim.empty());
  for (int64_t d : dim) {
    check(d >= -std::max<int64_t>(dims, 1) && d < std::max<int64_t>(dims, 1), "dim ", d,
          " is out of range for ", dims, " dimensions");
    if (dims > 0) reduced[d < 0 ? d + dims : d] = true;
  }
  Shape sizes, order;
  int64_t rows = 1, n = 1;
  for (int64_t d = 0; d < dims; ++d) {
    (reduced[d] ? n : rows) *= x.size(d);
    if (!reduced[d]) order.push_back(d);
    if (!reduced[d] || keepdim) sizes.push_back(reduced[d] ? 1 : x.size(d));
  }
  check(n > 0, "the mean of no elements is not defined");
  Tensor y = empty(sizes, contiguous_strides(sizes), x.scalar_type(), x);
  if (y.numel() == 0) return y;

  if (is_dense(view(x))) {
    const auto runs = runs_of(x, reduced);
    const auto matches = [&](std::initializer_list<bool> pattern) {
      return runs.has_value() && runs->size() == pattern.size() &&
             std::equal(pattern.begin(), pattern.end(), runs->begin(),
                        [](bool r, const Run& run) { return r == run.reduced; });
    };
    if (matches({}) || matches({false}) || matches({true}) || matches({false, true})) {
      mean_of_rows(bytes(x), rows, n, is_signed, bytes(y));
      return y;
    }
    const bool outer = matches({false, true, false});
    if (outer || matches({true, false})) {
      if (mean_of_columns(bytes(x), outer ? (*runs)[0].size : 1, n, runs->back().size, is_signed, bytes(y)))
        return y;
    }
  }
  for (int64_t d = 0; d < dims; ++d) {
    if (reduced[d]) order.push_back(d);
  }
  Tensor copy = empty(sizes_of(x), dense_strides(sizes_of(x), order), x.scalar_type(), x);
  torch::stable::copy_(copy, x);
  mean_of_rows(bytes(copy), rows, n, is_signed, bytes(y));
  return y;
}

// ---------------------------------------------------------------------- interpolation

Tensor interpolate_op(const Tensor x, const Shape output_size, const std::vector<double> ratios, int64_t mode,
                      bool align_corners) {
  check(0 <= mode && mode <= static_cast<int64_t>(Interpolation::linear), "mode must be 0, 1 or 2, got ", mode);
  check(ratios.size() == output_size.size(), "ratios must have as many elements as output_size");
  const PoolInput input(x, output_size.size());
  Resizing resizing = {static_cast<Interpolation>(mode),
                       align_corners,
                       kPoolDims - static_cast<int>(input.dims),
                       {},
                       {},
                       {1, 1, 1}};
  for (int k = 0; k < kPoolDims; ++k) {
    resizing.sizes[k] = input.sizes.spatial[k];
    resizing.outputs[k] = of_dim(output_size, input.dims, k, 1, "output_size");
    check(resizing.sizes[k] > 0 && resizing.outputs[k] > 0, "sizes must be positive");
    if (k >= resizing.first) resizing.ratios[k] = ratios[k - resizing.first];
    check(resizing.ratios[k] >= 0 && resizing.ratios[k] < INFINITY, "ratios must be finite and not negative");
  }
  return pooled(input, resizing.outputs, input.batched && !x.is_contiguous(),
                [&](const Images& images, uint8_t* out) { interpolate(images, resizing, out); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("quantized_max_pool", TORCH_BOX(&max_pool_op));
  m.impl("quantized_avg_pool", TORCH_BOX(&avg_pool_op));
  m.impl("quantized_adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool_op));
  m.impl("quantized_mean", TORCH_BOX(&mean_op));
  m.impl("quantized_interpolate", TORCH_BOX(&interpolate_op));
}

}  // namespace fastquant
