// The tables of kernels on quantized values, one table for each subject. An instruction set takes, of each
// subject, the best table that it can run; several may share one (../dispatch.cpp). Kernels are plain functions
// over raw memory and run on one thread; the walks (matrix.cpp and so on) deal with layouts and threads.
#pragma once

namespace fastquant {

struct MatrixKernels;       // matrix_kernels.h
struct DepthwiseKernels;    // depthwise_kernels.h
struct ElementwiseKernels;  // elementwise_kernels.h
struct PoolingKernels;      // pooling_kernels.h
struct NormKernels;         // norm_kernels.h
struct RecurrentKernels;    // recurrent_kernels.h
struct EmbeddingKernels;    // embedding_kernels.h

struct QuantizedKernels {
  const MatrixKernels* matrix;
  const DepthwiseKernels* depthwise;
  const ElementwiseKernels* elementwise;
  const PoolingKernels* pooling;
  const NormKernels* norm;
  const RecurrentKernels* recurrent;
  const EmbeddingKernels* embedding;
};

// The tables of the instruction set in use; a walk takes its own: `*quantized_kernels().pooling`.
const QuantizedKernels& quantized_kernels();

}  // namespace fastquant
