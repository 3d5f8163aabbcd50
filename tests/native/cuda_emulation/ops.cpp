// Registers csrc/cuda/ops.cpp as the implementation for CPU tensors. CMakeLists.txt renames the torch library
// from fastquant to fastquant_emulated, since the ops of "fastquant" have CPU kernels of their own.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU
#include "cuda/ops.cpp"
