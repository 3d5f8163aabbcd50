// The CUDA ops for CPU tensors: csrc/cuda/ops.cpp, registered for another device. Compiled with
// fastquant renamed, since the ops of that name have CPU kernels of their own.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU
#include "cuda/ops.cpp"
