// Embeddings and bags of embeddings from packed rows, on plain memory and in parallel.
#pragma once

#include <optional>

#include "../../memory.h"
#include "embedding_kernels.h"

namespace fastquant {

// Bytes of a packed row of `dim` elements of 8 or 4 bits.
int64_t embedding_row_bytes(int64_t dim, int64_t bits);

struct EmbeddingTable {
  const uint8_t* data;
  int64_t rows, dim, bits;
};

// 32- or 64-bit integers.
struct Integers1d {
  const void* data;
  Element type;
  int64_t count;
};

// The numbers are those of torch.nn.functional.embedding_bag.
enum class BagMode : int64_t { sum, mean, max };

struct Bags {
  Integers1d offsets;    // where bags begin; bags of one size have none
  int64_t count, size;   // of bags, and of each of those of one size
  bool ends;             // whether the last offset is where the last bag ends
  const float* weights;  // one for each index, or none
  Integers1d mapping;    // which row each index stands for: -1 for a row of zeros. May have no data
  BagMode mode;
  std::optional<int64_t> padding;  // an index that no bag counts
};

// out: [indices, dim]
void embedding(const EmbeddingTable& table, const Integers1d& indices, float* out);

// out: [bags, dim]. A bag of no rows is zeros.
void embedding_bag(const EmbeddingTable& table, const Integers1d& indices, const Bags& bags, float* out);

}  // namespace fastquant
