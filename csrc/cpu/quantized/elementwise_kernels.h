// The table of elementwise kernels. They work on matrices: rows of `columns` contiguous elements.
#pragma once

#include <cstdint>

#include "../../math/numbers.h"

namespace fastquant {

// A matrix in memory: `stride` elements lie between the beginnings of two rows.
template <class S>
struct Rows {
  S* data;
  int64_t stride;
};

// What is done to a whole number of steps before it is stored: the zero point is added, and the sum is limited
// to [low, high]. `flip` is 0x80 where the output is int8, else 0. All numbers are those of unsigned bytes.
struct Output {
  int zero_point;
  uint8_t low, high, flip;
};

// A quantized operand: an element counts ratio * (q - zero_point) steps of the output.
struct Operand {
  float ratio;
  int zero_point;
  uint8_t flip;
};

template <class S>
struct FloatKernels {
  // out[r][c] = x[r][c] * inverse_scale + zero_point, one operation, rounded to an integer and limited.
  void (*quantize)(Rows<const S> x, Rows<uint8_t> out, int64_t rows, int64_t columns, float inverse_scale,
                   const Output& output);
  // The same of the transposed matrix: out[r][c] from x[c][r].
  void (*quantize_transposed)(Rows<const S> x, Rows<uint8_t> out, int64_t rows, int64_t columns,
                              float inverse_scale, const Output& output);
  // out[i] = (x[i] - zero_point) * ratio
  void (*dequantize)(const uint8_t* x, S* out, int64_t n, const Operand& operand);
};

struct ElementwiseKernels {
  FloatKernels<float> f32;
  FloatKernels<Half> f16;
  FloatKernels<BFloat16> bf16;

  // The sum of both operands' steps. In a row, b may be one element that counts for all columns.
  void (*add)(Rows<const uint8_t> a, Rows<const uint8_t> b, bool one_b, Rows<uint8_t> out, int64_t rows,
              int64_t columns, const Operand& of_a, const Operand& of_b, const Output& output);
  // The product (a - zero_point) * (b - zero_point), which is exact, times the ratio of a. That of b is not
  // used.
  void (*mul)(Rows<const uint8_t> a, Rows<const uint8_t> b, bool one_b, Rows<uint8_t> out, int64_t rows,
              int64_t columns, const Operand& of_a, const Operand& of_b, const Output& output);
  void (*requantize)(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns,
                     const Operand& operand, const Output& output);
  // out[r][c] = x[c][r]
  void (*transpose)(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns);
  // out[r][c] = table[x[r][c]], of tables with 256 entries.
  void (*look_up)(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns,
                  const uint8_t* table);
  void (*look_up_floats)(const uint8_t* x, float* out, int64_t n, const float* table);
};

extern const ElementwiseKernels kElementwiseScalar;
extern const ElementwiseKernels kElementwiseAvx2;
extern const ElementwiseKernels kElementwiseAvx512;
extern const ElementwiseKernels kElementwiseAvx512Vbmi;
extern const ElementwiseKernels kElementwiseNeon;

}  // namespace fastquant
