// The table of kernels for embeddings. A packed row holds an embedding: its values, a byte or half a byte each,
// the lower half first; then in fp32 its scale and its zero point, negated. The bytes of values are enough for
// 16 of them, so that kernels can load whole vectors.
#pragma once

#include <cstdint>

namespace fastquant {

struct EmbeddingRows {
  const uint8_t* data;
  int64_t count, dim;
  int64_t value_bytes, row_bytes;  // of a row: without and with scale and zero point
};

// Numbers of rows. `readable` of them, at least `count`, may be read, so that rows can be prefetched.
struct RowNumbers {
  const int64_t* data;
  int64_t count, readable;
};

// Element i of a row is fma(value[i], scale, -zero_point * scale). Kernels return false where there is no row
// of some number; what they write is then of no use.
struct EmbeddingKernels {
  struct OfBits {
    // The elements of each row, one row after another.
    bool (*expand)(const EmbeddingRows& rows, const RowNumbers& numbers, float* out);
    // The sum of the rows, each times its weight if there are weights, divided by `divisor`.
    bool (*sum)(const EmbeddingRows& rows, const RowNumbers& numbers, const float* weights, float divisor,
                float* out);
    // The largest of each element. There must be a row.
    bool (*max)(const EmbeddingRows& rows, const RowNumbers& numbers, float* out);
  };
  OfBits of_bytes, of_nibbles;
};

extern const EmbeddingKernels kEmbeddingScalar;
extern const EmbeddingKernels kEmbeddingAvx2;
extern const EmbeddingKernels kEmbeddingAvx512;
extern const EmbeddingKernels kEmbeddingNeon;

}  // namespace fastquant
