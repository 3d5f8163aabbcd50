#include "bytes_scalar.h"
#include "kernels/embedding-inl.h"

namespace fastquant {

extern const EmbeddingKernels kEmbeddingScalar = embedding_table<ScalarBytes>();

}  // namespace fastquant
