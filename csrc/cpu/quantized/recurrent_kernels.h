// The table of kernels of recurrent layers: what follows the matrix products in a step of one sequence.
#pragma once

#include <cstdint>

namespace fastquant {

// from_x and from_h: what the input and the hidden state give for each gate, bias included, as [gates][hidden].
struct RecurrentKernels {
  // Gates: input, forget, cell, output. c and h are updated in place; the h before is not needed.
  void (*lstm)(const float* from_x, const float* from_h, int64_t hidden, float* c, float* h);
  // Gates: reset, update, new. h is updated in place.
  void (*gru)(const float* from_x, const float* from_h, int64_t hidden, float* h);
};

extern const RecurrentKernels kRecurrentScalar;
extern const RecurrentKernels kRecurrentAvx2;
extern const RecurrentKernels kRecurrentAvx512;
extern const RecurrentKernels kRecurrentNeon;

}  // namespace fastquant
