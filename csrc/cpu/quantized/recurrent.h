// Layers of recurrent networks that quantize their inputs and hidden states at each call.
#pragma once

#include <cstdint>

#include "output.h"

namespace fastquant {

// One layer in one direction. Step t has the rows of the first batch_sizes[t] sequences, one after the other;
// batch_sizes do not increase, and where they are null, each step has all of `batch`.
struct Sequences {
  const float* x;  // [rows of all steps, inputs]
  const int64_t* batch_sizes;
  int64_t rows, steps, batch;
  int64_t inputs, hidden;
  bool reverse;  // from the last step to the first
  bool reduce_range;
};

// Packed weights (packing.h) of all gates, for the input and for the hidden state.
struct RecurrentWeights {
  const uint8_t *of_x, *of_h;
  LayerScales scales_of_x, scales_of_h;
};

// y: [rows, hidden], the hidden states. h and c: [batch, hidden]; the states before and, when the function
// returns, after each sequence. The input of all steps is quantized at once, the hidden states of each step.
void dynamic_lstm(const Sequences& s, const RecurrentWeights& weights, float* y, float* h, float* c);
void dynamic_gru(const Sequences& s, const RecurrentWeights& weights, float* y, float* h);

}  // namespace fastquant
