#include "recurrent.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../arrays.h"
#include "dynamic.h"
#include "kernels.h"
#include "recurrent_kernels.h"

namespace fastquant {
namespace {

// Computing the gates of one unit takes as long as writing this many elements.
constexpr int64_t kElementsOfUnit = 32;

// The input's part of the gates is computed for so many bytes of them at once, which stay in a cache until the
// steps read them.
constexpr int64_t kBytesOfGates = 1 << 20;

// Where the rows of a step begin.
struct Step {
  int64_t first, count;
};

std::vector<Step> steps_of(const Sequences& s) {
  std::vector<Step> steps(s.steps);
  int64_t first = 0;
  for (int64_t t = 0; t < s.steps; ++t) {
    steps[t] = {first, s.batch_sizes == nullptr ? s.batch : s.batch_sizes[t]};
    first += steps[t].count;
  }
  if (s.reverse) std::reverse(steps.begin(), steps.end());
  return steps;
}

// Calls cell(row, from_x, from_h) for each row of each step, where `gates` gates of each unit lie.
template <class Cell>
void for_steps(const Sequences& s, const RecurrentWeights& weights, int64_t gates, float* y, float* h,
               const Cell& cell) {
  if (s.rows == 0 || s.hidden == 0) return;
  const int64_t width = gates * s.hidden;
  const int64_t at_once =
      std::min(s.rows, std::max(s.batch, kBytesOfGates / (width * static_cast<int64_t>(sizeof(float)))));
  const std::unique_ptr<float[]> from_x(new float[at_once * width]), from_h(new float[s.batch * width]);
  const DynamicInput x(s.x, Element::f32, s.rows * s.inputs, s.reduce_range);
  const std::vector<Step> steps = steps_of(s);
  for (size_t begin = 0; begin < steps.size();) {
    size_t end = begin;
    int64_t rows = 0;
    while (end < steps.size() && rows + steps[end].count <= at_once) rows += steps[end++].count;
    const int64_t first = steps[s.reverse ? end - 1 : begin].first;
    x.linear(s.rows, first, rows, width, weights.of_x, weights.scales_of_x, false, from_x.get(),
             OutputType::f32);
    for (; begin < end; ++begin) {
      const Step step = steps[begin];
      dynamic_linear(h, Element::f32, step.count, s.hidden, width, weights.of_h, weights.scales_of_h, false,
                     s.reduce_range, from_h.get(), OutputType::f32);
      const float* const gates_of_x = from_x.get() + (step.first - first) * width;
      const int64_t pieces = std::min(step.count, piece_count(step.count * s.hidden * kElementsOfUnit));
      for_pieces(step.count, pieces, 1, [&](int64_t, int64_t r, int64_t last) {
        for (; r < last; ++r) {
          cell(r, gates_of_x + r * width, from_h.get() + r * width);
          std::memcpy(y + (step.first + r) * s.hidden, h + r * s.hidden, s.hidden * sizeof(float));
        }
      });
    }
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
