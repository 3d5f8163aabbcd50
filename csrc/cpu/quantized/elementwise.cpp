#include "elementwise.h"

#include <cstring>
#include <vector>

#include "kernels.h"
#include "loops.h"

namespace fastquant {
namespace {

const ElementwiseKernels& table() { return *quantized_kernels().elementwise; }

// Kernels that only move bytes, or look them up, take so little time that threads pay off later.
constexpr int64_t kGrainOfMoving = 4 * kGrain;

template <class F>
auto with_kernels(Element type, const F& f) {
  switch (type) {
    case Element::f16:
      return f(table().f16, Half{});
    case Element::bf16:
      return f(table().bf16, BFloat16{});
    default:
      check(type == Element::f32, "only float32, float16 and bfloat16 can be quantized");
      return f(table().f32, float{});
  }
}

template <class F>
void for_flat(int64_t n, int64_t grain, const F& f) {
  for_pieces(n, piece_count(n, grain), 64, [&](int64_t, int64_t begin, int64_t end) {
    if (begin < end) f(begin, end - begin);
  });
}

// Calls f(image, first pixel, pixels) for parts of images, in parallel. A part of an image that is not its last
// has a multiple of 64 pixels.
template <class F>
void for_pixels(int64_t images, int64_t channels, int64_t pixels, const F& f) {
  constexpr int64_t kUnit = 64;
  const int64_t units = (pixels + kUnit - 1) / kUnit, all = images * units;
  if (all * channels == 0) return;
  const int64_t pieces = std::min(piece_count(images * channels * pixels), all);
  for_pieces(all, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / units, first = begin % units;
      const int64_t count = std::min(end - begin, units - first);
      f(image, first * kUnit, std::min(count * kUnit, pixels - first * kUnit));
      begin += count;
    }
  });
}

bool is_aligned(const Loops<1>& loops) { return loops.columns() == 1 || loops.inner(1) == 1; }

// One slice of a concatenation.
struct Copy {
  Loops<1> loops;
  const uint8_t* data;
  Operand operand;
  uint8_t* out;
  Output output;

  bool keeps_steps() const {
    return operand.ratio == 1.0f && operand.zero_point == output.zero_point && operand.flip == output.flip &&
           output.low == 0 && output.high == 255;
  }
  int64_t grain() const { return keeps_steps() ? kGrainOfMoving : kGrain; }

  void operator()(const int64_t* offsets, int64_t rows, int64_t columns) const {
    const uint8_t* const from = data + offsets[1];
    uint8_t* const to = out + offsets[0];
    if (!keeps_steps()) {
      table().requantize({from, loops.outer(1)}, {to, loops.outer(0)}, rows, columns, operand, output);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * loops.outer(0), from + r * loops.outer(1), static_cast<size_t>(columns));
    }
  }
};

}  // namespace

Output output_of(const Quantization& q, double low, double high) {
  const int zero_point = zero_point_of_bytes(q.zero_point, q.is_signed);
  const auto level = [&](double bound) {
    const double steps = std::nearbyint(bound / q.scale) + zero_point;
    return static_cast<uint8_t>(std::min(std::max(steps, 0.0), 255.0));
  };
  return {zero_point, level(low), level(high), flip_of(q.is_signed)};
}

Operand operand_of(const Quantization& q, double unit) {
  // Where a scale is so much larger than the output's, every element but those of 0 is beyond the output's
  // range, and so is it with a finite ratio.
  const double ratio = std::min(q.scale / unit, 0x1p100);
  return {static_cast<float>(ratio), zero_point_of_bytes(q.zero_point, q.is_signed), flip_of(q.is_signed)};
}

BinaryOperands operands_of(Binary op, const Quantization& a, const Quantization& b, double unit) {
  const Quantization product = {a.scale * b.scale, a.zero_point, a.is_signed};
  return {operand_of(op == Binary::mul ? product : a, unit), operand_of(b, unit)};
}

void quantize(const void* x, Element type, int64_t n, const Quantization& q, uint8_t* out) {
  const Output output = output_of(q, -INFINITY, INFINITY);
  const float inverse_scale = 1.0f / static_cast<float>(q.scale);
  with_kernels(type, [&](const auto& kernels, auto stored) {
    const auto* const from = static_cast<const decltype(stored)*>(x);
    for_flat(n, kGrain, [&](int64_t begin, int64_t count) {
      kernels.quantize({from + begin, count}, {out + begin, count}, 1, count, inverse_scale, output);
    });
  });
}

void quantize_transposed(const void* x, Element type, int64_t images, int64_t channels, int64_t pixels,
                         const Quantization& q, uint8_t* out) {
  const Output output = output_of(q, -INFINITY, INFINITY);
  const float inverse_scale = 1.0f / static_cast<float>(q.scale);
  with_kernels(type, [&](const auto& kernels, auto stored) {
    const auto* const from = static_cast<const decltype(stored)*>(x);
    for_pixels(images, channels, pixels, [&](int64_t image, int64_t first, int64_t count) {
      const int64_t at = image * channels * pixels;
      kernels.quantize_transposed({from + at + first, pixels}, {out + at + first * channels, channels}, count,
                                  channels, inverse_scale, output);
    });
  });
}

void transpose(const uint8_t* x, int64_t images, int64_t channels, int64_t pixels, uint8_t* out) {
  for_pixels(images, channels, pixels, [&](int64_t image, int64_t first, int64_t count) {
    const int64_t at = image * channels * pixels;
    table().transpose({x + at + first, pixels}, {out + at + first * channels, channels}, count, channels);
  });
}

void dequantize(const uint8_t* x, int64_t n, const Quantization& q, Element type, void* out) {
  Operand operand = operand_of(q, 1.0);
  operand.ratio = static_cast<float>(q.scale);
  with_kernels(type, [&](const auto& kernels, auto stored) {
    auto* const to = static_cast<decltype(stored)*>(out);
    for_flat(n, kGrain,
             [&](int64_t begin, int64_t count) { kernels.dequantize(x + begin, to + begin, count, operand); });
  });
}

bool binary(Binary op, int dims, const int64_t* sizes, const Bytes& a, const Operand& of_a, const Bytes& b,
            const Operand& of_b, const BytesOut& out, const Output& output) {
  const Loops<2> loops(dims, sizes, {out.strides, a.strides, b.strides});
  if (loops.columns() == 0) return true;
  const auto kernel = op == Binary::add ? table().add : table().mul;
  const int64_t inner_a = loops.inner(1), inner_b = loops.inner(2);
  // Both operations are commutative: the operand that is broadcast comes second.
  const bool swapped = inner_a == 0;
  if ((swapped ? inner_b : inner_a) != 1 || (inner_b != 1 && inner_b != 0)) return false;
  const bool one = swapped || inner_b == 0;
  const int first = swapped ? 2 : 1, second = swapped ? 1 : 2;
  Operand of_first = swapped ? of_b : of_a, of_second = swapped ? of_a : of_b;
  if (swapped && op == Binary::mul) std::swap(of_first.ratio, of_second.ratio);
  const uint8_t* const data[] = {nullptr, a.data, b.data};
  loops.run(kGrain, [&](const int64_t* offsets, int64_t rows, int64_t columns) {
    kernel({data[first] + offsets[first], loops.outer(first)},
           {data[second] + offsets[second], loops.outer(second)}, one, {out.data + offsets[0], loops.outer(0)},
           rows, columns, of_first, of_second, output);
  });
  return true;
}

bool is_aligned(int dims, const int64_t* sizes, const Bytes& x, const BytesOut& out) {
  return is_aligned(Loops<1>(dims, sizes, {out.strides, x.strides}));
}

bool concatenate(int dims, int64_t axis, const Slice* slices, int64_t count, const BytesOut& out,
                 const Output& output) {
  std::vector<Copy> copies;
  copies.reserve(static_cast<size_t>(count));
  uint8_t* to = out.data;
  for (int64_t i = 0; i < count; ++i) {
    const Slice& s = slices[i];
    copies.push_back({Loops<1>(dims, s.sizes, {out.strides, s.x.strides}), s.x.data, s.operand, to, output});
    if (!is_aligned(copies.back().loops)) return false;
    to += s.sizes[axis] * out.strides[axis];
  }
  // Rows of a few slices follow each other in memory, so they are written together.
  const int64_t rows = copies.front().loops.rows();
  int64_t columns = 0, narrowest = copies.front().loops.columns();
  bool together = rows > 1;
  for (const Copy& copy : copies) {
    together = together && copy.loops.rows() == rows;
    columns += copy.loops.columns();
    narrowest = std::min(narrowest, copy.loops.columns());
  }
  if (!together) {
    for (const Copy& copy : copies) copy.loops.run(copy.grain(), copy);
    return true;
  }
  // Few rows at once, so that memory is written nearly in order, but so many elements of each slice that a
  // table for them pays off.
  constexpr int64_t kBlock = int64_t{1} << 17, kOfSlice = 4096;
  const int64_t step = std::max<int64_t>(std::min(kBlock / columns, kOfSlice / narrowest), 1);
  const int64_t pieces = std::min(piece_count(rows * columns, copies.front().grain()), rows);
  for_pieces(rows, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (; begin < end; begin += step) {
      for (const Copy& copy : copies) copy.loops.run_rows(begin, std::min(begin + step, end), copy);
    }
  });
  return true;
}

void look_up(const uint8_t* x, int64_t n, const uint8_t* entries, uint8_t* out) {
  for_flat(n, kGrainOfMoving, [&](int64_t begin, int64_t count) {
    table().look_up({x + begin, count}, {out + begin, count}, 1, count, entries);
  });
}

void look_up(const uint8_t* x, int64_t n, const float* entries, float* out) {
  for_flat(n, kGrain, [&](int64_t begin, int64_t count) {
    table().look_up_floats(x + begin, out + begin, count, entries);
  });
}

}  // namespace fastquant
