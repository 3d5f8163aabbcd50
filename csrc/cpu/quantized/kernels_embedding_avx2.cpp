#include "bytes_avx2.h"
#include "kernels/embedding-inl.h"

namespace fastquant {

extern const EmbeddingKernels kEmbeddingAvx2 = embedding_table<Avx2Bytes>();

}  // namespace fastquant
