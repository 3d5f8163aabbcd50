// Registers the CPU implementations of the elementwise and pooling ops on quantized tensors.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../../tensors.h"
#include "../arrays.h"
#include "../huge_pages.h"
#include "elementwise.h"
#include "interpolation.h"
#include "normalization.h"
#include "pooling.h"

namespace fastquant {
namespace {

using Shape = std::vector<int64_t>;

bool is_int8(ScalarType type) {
  check(type == ScalarType::Byte || type == ScalarType::Char, "a quantized tensor must be uint8 or int8");
  return type == ScalarType::Char;
}

Quantization quantization(double scale, int64_t zero_point, ScalarType type) {
  check(scale > 0 && scale < INFINITY, "scale must be positive and finite, got ", scale);
  return {scale, zero_point, is_int8(type)};
}

const uint8_t* bytes(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }
uint8_t* bytes(Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

Shape sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }
Shape strides_of(const Tensor& x) { return {x.strides().begin(), x.strides().end()}; }

// ---------------------------------------------------------------------------- layouts

// The strides of a tensor without gaps, whose dimensions lie in memory in this order, outermost first.
Shape dense_strides(const Shape& sizes, const Shape& order) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = order.size(); k-- > 0;) {
    strides[order[k]] = stride;
    stride *= std::max<int64_t>(sizes[order[k]], 1);
  }
  return strides;
}

Shape in_order(size_t dims) {
  Shape order;
  for (size_t d = 0; d < dims; ++d) order.push_back(static_cast<int64_t>(d));
  return order;
}

Shape contiguous_strides(const Shape& sizes) { return dense_strides(sizes, in_order(sizes.size())); }

Shape channels_last_strides(const Shape& sizes) {
  Shape strides(sizes.size());
  int64_t stride = sizes[1];
  strides[1] = 1;
  for (size_t d = sizes.size(); d-- > 2; stride *= sizes[d]) strides[d] = stride;
  strides[0] = stride;
  return strides;
}

Tensor empty(const Shape& sizes, const Shape& strides, ScalarType type, const Tensor& like) {
  Tensor y = empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, like);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * static_cast<int64_t>(y.element_size()));
  return y;
}

Tensor empty_like(const Tensor& x, ScalarType type) { return empty(sizes_of(x), strides_of(x), type, x); }

bool has_strides(const Tensor& x, const Shape& strides) {
  const auto sizes = x.sizes(), s = x.strides();
  for (size_t d = 0; d < strides.size(); ++d) {
    if (sizes[d] != 1 && s[d] != strides[d]) return false;
  }
  return true;
}

bool has_channels_last(const Tensor& x) { return 3 <= x.dim() && x.dim() <= 5; }

// Whether torch takes these strides for channels_last, as Tensor::suggest_memory_format does.
bool suggests_channels_last(const Tensor& x) {
  if (x.dim() != 4 && x.dim() != 5) return false;
  const auto sizes = x.sizes(), strides = x.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t k = 0; k < x.dim(); ++k) {
    const int64_t d = k == 0 ? 1 : k == x.dim() - 1 ? 0 : x.dim() - k;
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = sizes[d] > 1 ? strides[d] * sizes[d] : strides[d];
  }
  return true;
}

// x, copied into memory where its dimensions have the order that the last of `out` have.
Tensor aligned_with(const Tensor& x, const Shape& strides_of_out) {
  const size_t more = strides_of_out.size() - static_cast<size_t>(x.dim());
  Shape order = in_order(static_cast<size_t>(x.dim()));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return strides_of_out[more + a] > strides_of_out[more + b]; });
  const Shape sizes = sizes_of(x);
  Tensor copy = empty(sizes, dense_strides(sizes, order), x.scalar_type(), x);
  torch::stable::copy_(copy, x);
  return copy;
}

// Sizes and strides of x as a view of a tensor that it is broadcast to.
Shape broadcast_strides(const Tensor& x, const Shape& sizes) {
  Shape strides(sizes.size(), 0);
  const size_t more = sizes.size() - static_cast<size_t>(x.dim());
  for (size_t d = more; d < sizes.size(); ++d) {
    if (x.sizes()[d - more] != 1) strides[d] = x.strides()[d - more];
  }
  return strides;
}

Shape broadcast_sizes(const Tensor& a, const Tensor& b) {
  const Tensor& longer = a.dim() < b.dim() ? b : a;
  const Tensor& shorter = a.dim() < b.dim() ? a : b;
  Shape sizes = sizes_of(longer);
  const size_t more = sizes.size() - static_cast<size_t>(shorter.dim());
  for (size_t d = more; d < sizes.size(); ++d) {
    const int64_t other = shorter.sizes()[d - more];
    check(sizes[d] == other || sizes[d] == 1 || other == 1, "shapes of a and b cannot be broadcast");
    if (sizes[d] == 1) sizes[d] = other;
  }
  return sizes;
}

// ------------------------------------------------------------------- quantize, dequantize

Tensor quantize_op(const Tensor x, double scale, int64_t zero_point, ScalarType dtype, bool channels_last) {
  const Quantization q = quantization(scale, zero_point, dtype);
  if (x.scalar_type() == ScalarType::Double) {
    return quantize_op(torch::stable::to(x, ScalarType::Float), scale, zero_point, dtype, channels_last);
  }
  const Element type = element(x.scalar_type());
  const Shape sizes = sizes_of(x);
  if (channels_last && has_channels_last(x) && !has_strides(x, channels_last_strides(sizes))) {
    const Tensor t = torch::stable::contiguous(x);
    Tensor y = empty(sizes, channels_last_strides(sizes), dtype, x);
    const int64_t image = sizes[0] == 0 ? 0 : x.numel() / sizes[0];
    quantize_transposed(t.const_data_ptr(), type, sizes[0], sizes[1], sizes[1] == 0 ? 0 : image / sizes[1], q,
                        bytes(y));
    return y;
  }
  const Tensor t = densified(x);
  Tensor y = channels_last && has_channels_last(x) ? empty(sizes, channels_last_strides(sizes), dtype, x)
                                                   : empty_like(t, dtype);
  quantize(t.const_data_ptr(), type, t.numel(), q, bytes(y));
  return y;
}

Tensor dequantize_op(const Tensor x, double scale, int64_t zero_point, ScalarType dtype) {
  const Quantization q = quantization(scale, zero_point, x.scalar_type());
  if (dtype == ScalarType::Double) {
    return torch::stable::to(dequantize_op(x, scale, zero_point, ScalarType::Float), dtype);
  }
  const Tensor t = densified(x);
  Tensor y = empty_like(t, dtype);
  dequantize(bytes(t), t.numel(), q, element(dtype), y.mutable_data_ptr());
  return y;
}

// ------------------------------------------------------------------- sums and products

template <Binary op>
Tensor binary_op(const Tensor a, double a_scale, int64_t a_zero_point, const Tensor b, double b_scale,
                 int64_t b_zero_point, double scale, int64_t zero_point, double low, double high) {
  const Quantization of_a = quantization(a_scale, a_zero_point, a.scalar_type());
  const Quantization of_b = quantization(b_scale, b_zero_point, b.scalar_type());
  const Output output = output_of(quantization(scale, zero_point, a.scalar_type()), low, high);
  const auto [left, right] = operands_of(op, of_a, of_b, scale);

  const Shape sizes = broadcast_sizes(a, b);
  const auto is_whole = [&](const Tensor& x) { return sizes == sizes_of(x); };
  const Tensor* const model = is_whole(a) ? &a : is_whole(b) ? &b : nullptr;
  const Shape strides = model == nullptr         ? contiguous_strides(sizes)
                        : is_dense(view(*model)) ? strides_of(*model)
                                                 : strides_of(torch::stable::empty_like(*model));
  Tensor y = empty(sizes, strides, a.scalar_type(), a);
  const auto run = [&, of_s = left, of_t = right](const Tensor& s, const Tensor& t) {
    const Shape strides_s = broadcast_strides(s, sizes), strides_t = broadcast_strides(t, sizes);
    return binary(op, static_cast<int>(sizes.size()), sizes.data(), {bytes(s), strides_s.data()}, of_s,
                  {bytes(t), strides_t.data()}, of_t, {bytes(y), strides.data()}, output);
  };
  if (!run(a, b)) check(run(aligned_with(a, strides), aligned_with(b, strides)), "tensors cannot be aligned");
  return y;
}

// ------------------------------------------------------------------------ concatenation

Tensor cat_op(const std::vector<Tensor> tensors, const std::vector<double> scales,
              const std::vector<int64_t> zero_points, int64_t dim, double scale, int64_t zero_point, double low,
              double high) {
  check(!tensors.empty() && tensors.size() == scales.size() && tensors.size() == zero_points.size(),
        "cat needs a scale and a zero point for each of its tensors, and at least one");
  const Tensor& first = tensors[0];
  const int64_t dims = first.dim(), axis = dim < 0 ? dim + dims : dim;
  check(axis >= 0 && axis < dims, "dim ", dim, " is out of range for ", dims, " dimensions");
  Shape sizes = sizes_of(first);
  sizes[axis] = 0;
  bool channels_last = true;
  for (const Tensor& x : tensors) {
    check(x.dim() == dims && x.scalar_type() == first.scalar_type(),
          "tensors must have the same dtype and number of dimensions");
    for (int64_t d = 0; d < dims; ++d) {
      check(d == axis || x.size(d) == sizes[d], "tensors must have the same sizes except in dimension ", dim);
    }
    sizes[axis] += x.size(axis);
    channels_last = channels_last && suggests_channels_last(x);
  }
  const Shape strides = channels_last ? channels_last_strides(sizes) : contiguous_strides(sizes);
  const Output output = output_of(quantization(scale, zero_point, first.scalar_type()), low, high);
  Tensor y = empty(sizes, strides, first.scalar_type(), first);
  const BytesOut out = {bytes(y), strides.data()};
  std::vector<Tensor> aligned;
  std::vector<Slice> slices;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const bool is = is_aligned(static_cast<int>(dims), x.sizes().data(), {bytes(x), x.strides().data()}, out);
    aligned.push_back(is ? x : aligned_with(x, strides));
    const Tensor& a = aligned.back();
    slices.push_back({a.sizes().data(),
                      {bytes(a), a.strides().data()},
                      operand_of(quantization(scales[i], zero_points[i], first.scalar_type()), scale)});
  }
  check(concatenate(static_cast<int>(dims), axis, slices.data(), static_cast<int64_t>(slices.size()), out,
                    output),
        "tensors cannot be aligned");
  return y;
}

Tensor lookup_op(const Tensor x, const Tensor table) {
  check(table.is_cpu() && table.is_contiguous() && table.numel() == 256, "table must have 256 entries, got ",
        table.numel());
  is_int8(x.scalar_type());
  const Tensor t = densified(x);
  Tensor y = empty_like(t, table.scalar_type());
  if (table.scalar_type() == ScalarType::Float) {
    look_up(bytes(t), t.numel(), static_cast<const float*>(table.const_data_ptr()),
            static_cast<float*>(y.mutable_data_ptr()));
  } else {
    is_int8(table.scalar_type());
    look_up(bytes(t), t.numel(), bytes(table), bytes(y));
  }
  return y;
}

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

// ------------------------------------------------------------------------------ norms

using OptionalTensor = std::optional<Tensor>;

std::vector<double> values_of(const Tensor& t, int64_t count, const char* name) {
  const Tensor c = torch::stable::contiguous(t);
  check(t.is_cpu() && t.numel() == count, name, " must have ", count, " elements, has ", t.numel());
  return read_values<double>({c.mutable_data_ptr(), element(c.scalar_type()), count, name});
}

Affine affine_of(const OptionalTensor& weight, const OptionalTensor& bias, int64_t count) {
  Affine affine;
  if (weight.has_value()) affine.weight = values_of(*weight, count, "weight");
  if (bias.has_value()) affine.bias = values_of(*bias, count, "bias");
  return affine;
}

// x with its channels last in memory, in a copy if they are not, and a result for it.
struct ChannelsLast {
  explicit ChannelsLast(const Tensor& given) : x(given) {
    check(x.dim() >= 2 && x.dim() <= 5, "x must have 2 to 5 dimensions, got ", x.dim());
    const Shape sizes = sizes_of(x);
    const Shape strides = x.dim() == 2 ? contiguous_strides(sizes) : channels_last_strides(sizes);
    channels = x.size(1);
    pixels = x.size(0) * channels == 0 ? 0 : x.numel() / (x.size(0) * channels);
    if (!has_strides(x, strides)) {
      x = empty(sizes, strides, x.scalar_type(), given);
      const Tensor t = torch::stable::contiguous(given);
      transpose(bytes(t), t.size(0), channels, pixels, bytes(x));
    }
    y = empty(sizes, strides, x.scalar_type(), given);
  }

  Tensor x, y;
  int64_t channels, pixels;
};

Tensor batch_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, const OptionalTensor weight,
                     const OptionalTensor bias, const Tensor running_mean, const Tensor running_var, double eps,
                     double scale, int64_t zero_point, double low, double high) {
  ChannelsLast t(x);
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), low, high};
  batch_norm(bytes(t.x), x.size(0) * t.pixels, t.channels, quantization(x_scale, x_zero_point, x.scalar_type()),
             affine_of(weight, bias, t.channels), values_of(running_mean, t.channels, "running_mean"),
             values_of(running_var, t.channels, "running_var"), eps, output, bytes(t.y));
  return t.y;
}

Tensor group_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, int64_t groups,
                     const OptionalTensor weight, const OptionalTensor bias, double eps, double scale,
                     int64_t zero_point) {
  ChannelsLast t(x);
  check(groups > 0 && t.channels % groups == 0, "the ", t.channels, " channels of x cannot be divided into ",
        groups, " groups");
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), -INFINITY, INFINITY};
  if (x.numel() == 0) return t.y;
  group_norm(bytes(t.x), x.size(0), t.pixels, t.channels, groups,
             quantization(x_scale, x_zero_point, x.scalar_type()), affine_of(weight, bias, t.channels), eps,
             output, bytes(t.y));
  return t.y;
}

Tensor layer_norm_op(const Tensor x, double x_scale, int64_t x_zero_point, const Shape normalized_shape,
                     const OptionalTensor weight, const OptionalTensor bias, double eps, double scale,
                     int64_t zero_point) {
  const size_t dims = static_cast<size_t>(x.dim()), more = dims - std::min(dims, normalized_shape.size());
  const Shape sizes = sizes_of(x);
  check(!normalized_shape.empty() && normalized_shape.size() <= dims &&
            std::equal(normalized_shape.begin(), normalized_shape.end(), sizes.begin() + more),
        "normalized_shape must be the last sizes of x");
  int64_t n = 1;
  for (int64_t size : normalized_shape) n *= size;
  const Tensor t = torch::stable::contiguous(x);
  Tensor y = empty(sizes, contiguous_strides(sizes), x.scalar_type(), x);
  const NormOutput output = {quantization(scale, zero_point, x.scalar_type()), -INFINITY, INFINITY};
  if (x.numel() == 0) return y;
  layer_norm(bytes(t), x.numel() / n, n, quantization(x_scale, x_zero_point, x.scalar_type()),
             affine_of(weight, bias, n), eps, output, bytes(y));
  return y;
}

Tensor softmax_op(const Tensor x, double x_scale, int64_t dim, double scale, int64_t zero_point) {
  const Quantization output = quantization(scale, zero_point, x.scalar_type());
  const Tensor t = densified(x);
  Tensor y = empty_like(t, t.scalar_type());
  if (x.numel() == 0) return y;
  const Dense d = x.dim() == 0 ? Dense{nullptr, Element::other, 1, 1, 1} : dense(view(t), dim);
  check(x_scale > 0 && x_scale < INFINITY, "x_scale must be positive and finite, got ", x_scale);
  softmax(bytes(t), d.outer, d.channels, d.inner, x_scale, output.is_signed, output, bytes(y));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("quantized_add", TORCH_BOX(&binary_op<Binary::add>));
  m.impl("quantized_mul", TORCH_BOX(&binary_op<Binary::mul>));
  m.impl("quantized_cat", TORCH_BOX(&cat_op));
  m.impl("lookup", TORCH_BOX(&lookup_op));
  m.impl("quantized_max_pool", TORCH_BOX(&max_pool_op));
  m.impl("quantized_avg_pool", TORCH_BOX(&avg_pool_op));
  m.impl("quantized_adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool_op));
  m.impl("quantized_mean", TORCH_BOX(&mean_op));
  m.impl("quantized_interpolate", TORCH_BOX(&interpolate_op));
  m.impl("quantized_batch_norm", TORCH_BOX(&batch_norm_op));
  m.impl("quantized_group_norm", TORCH_BOX(&group_norm_op));
  m.impl("quantized_layer_norm", TORCH_BOX(&layer_norm_op));
  m.impl("quantized_softmax", TORCH_BOX(&softmax_op));
}

}  // namespace fastquant
