#include "bytes_neon.h"
#include "kernels/embedding-inl.h"

namespace fastquant {

extern const EmbeddingKernels kEmbeddingNeon = embedding_table<NeonBytes>();

}  // namespace fastquant
