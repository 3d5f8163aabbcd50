// Elementwise operations on quantized tensors, on plain memory and in parallel.
#pragma once

#include "../../memory.h"
#include "elementwise_kernels.h"
#include "quantization.h"

namespace fastquant {

// The output of an operation, bounded by low and high in real units; infinite bounds are none.
Output output_of(const Quantization& q, double low, double high);
// A tensor whose elements count q.scale / unit.
Operand operand_of(const Quantization& q, double unit);

// x has n floating elements.
void quantize(const void* x, Element type, int64_t n, const Quantization& q, uint8_t* out);
// x is [images, channels, pixels], the output [images, pixels, channels].
void quantize_transposed(const void* x, Element type, int64_t images, int64_t channels, int64_t pixels,
                         const Quantization& q, uint8_t* out);
void transpose(const uint8_t* x, int64_t images, int64_t channels, int64_t pixels, uint8_t* out);
void dequantize(const uint8_t* x, int64_t n, const Quantization& q, Element type, void* out);

// Bytes with any strides.
struct Bytes {
  const uint8_t* data;
  const int64_t* strides;
};
struct BytesOut {
  uint8_t* data;
  const int64_t* strides;
};

enum class Binary { add, mul };

struct BinaryOperands {
  Operand a, b;
};

BinaryOperands operands_of(Binary op, const Quantization& a, const Quantization& b, double unit);

// All tensors have the output's sizes, which has no gaps. In its innermost dimension, the strides of a and b
// must be 1 or 0; returns false, having done nothing, where they are not, or where both are 0.
bool binary(Binary op, int dims, const int64_t* sizes, const Bytes& a, const Operand& of_a, const Bytes& b,
            const Operand& of_b, const BytesOut& out, const Output& output);

// A tensor that becomes a slice of another one.
struct Slice {
  const int64_t* sizes;
  Bytes x;
  Operand operand;
};

// Whether x has the innermost dimension of `out`.
bool is_aligned(int dims, const int64_t* sizes, const Bytes& x, const BytesOut& out);

// Concatenates tensors along `axis`, in an output without gaps, as other steps where they are not the same.
// Returns false, having done nothing, where one is not aligned.
bool concatenate(int dims, int64_t axis, const Slice* slices, int64_t count, const BytesOut& out,
                 const Output& output);

void look_up(const uint8_t* x, int64_t n, const uint8_t* table, uint8_t* out);
void look_up(const uint8_t* x, int64_t n, const float* table, float* out);

}  // namespace fastquant
