#include "recurrent.h"

#include <cstring>
#include <memory>

#include "../arrays.h"
#include "dynamic.h"
#include "kernels.h"
#include "recurrent_kernels.h"

namespace fastquant {
namespace {

// Computing the gates of one unit takes as long as writing this many elements.
constexpr int64_t kElementsOfUnit = 32;

// Calls cell(row, from_x, from_h) for each row of each step, where `gates` gates of each unit lie.
template <class Cell>
void for_steps(const Sequences& s, const RecurrentWeights& weights, int64_t gates, float* y, float* h,
               const Cell& cell) {
  if (s.rows == 0 || s.hidden == 0) return;
  const int64_t width = gates * s.hidden;
  const std::unique_ptr<float[]> from_x(new float[s.rows * width]), from_h(new float[s.batch * width]);
  dynamic_linear(s.x, Element::f32, s.rows, s.inputs, width, weights.of_x, weights.scales_of_x, false,
                 s.reduce_range, from_x.get(), OutputType::f32);
  int64_t first = s.reverse ? s.rows : 0;  // the step's rows begin here, or end
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t step = s.reverse ? s.steps - 1 - k : k;
    const int64_t count = s.batch_sizes == nullptr ? s.batch : s.batch_sizes[step];
    if (s.reverse) first -= count;
    dynamic_linear(h, Element::f32, count, s.hidden, width, weights.of_h, weights.scales_of_h, false,
                   s.reduce_range, from_h.get(), OutputType::f32);
    const int64_t pieces = std::min(count, piece_count(count * s.hidden * kElementsOfUnit));
    for_pieces(count, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        cell(r, from_x.get() + (first + r) * width, from_h.get() + r * width);
        std::memcpy(y + (first + r) * s.hidden, h + r * s.hidden, s.hidden * sizeof(float));
      }
    });
    if (!s.reverse) first += count;
  }
}

}  // namespace

void dynamic_lstm(const Sequences& s, const RecurrentWeights& weights, float* y, float* h, float* c) {
  const auto kernel = quantized_kernels().recurrent->lstm;
  for_steps(s, weights, 4, y, h, [&](int64_t r, const float* from_x, const float* from_h) {
    kernel(from_x, from_h, s.hidden, c + r * s.hidden, h + r * s.hidden);
  });
}

void dynamic_gru(const Sequences& s, const RecurrentWeights& weights, float* y, float* h) {
  const auto kernel = quantized_kernels().recurrent->gru;
  for_steps(s, weights, 3, y, h, [&](int64_t r, const float* from_x, const float* from_h) {
    kernel(from_x, from_h, s.hidden, h + r * s.hidden);
  });
}

}  // namespace fastquant
