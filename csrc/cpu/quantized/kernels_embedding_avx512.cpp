#include "bytes_avx512.h"
#include "kernels/embedding-inl.h"

namespace fastquant {

extern const EmbeddingKernels kEmbeddingAvx512 = embedding_table<Avx512Bytes>();

}  // namespace fastquant
