// Registers the CPU implementations of the elementwise ops on quantized tensors.
#include <torch/csrc/stable/library.h>

#include "elementwise.h"
#include "quantized_tensors.h"

namespace fastquant {
namespace {

// ---------------------------------------------------------------------------- layouts

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("dequantize", TORCH_BOX(&dequantize_op));
  m.impl("quantized_add", TORCH_BOX(&binary_op<Binary::add>));
  m.impl("quantized_mul", TORCH_BOX(&binary_op<Binary::mul>));
  m.impl("quantized_cat", TORCH_BOX(&cat_op));
  m.impl("lookup", TORCH_BOX(&lookup_op));
}

}  // namespace fastquant
