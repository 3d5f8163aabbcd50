#include "half_linear.h"

#include "arrays.h"

namespace fastquant {

void half_linear(const HalfLinear& layer) {
  // A product takes a quarter of the time that writing an element does.
  constexpr int64_t kProductsOfThread = 4 * kGrain, kTileOutputs = 4 * kHalfPanel, kTileRows = 6;
  const int64_t pieces = piece_count(layer.rows * layer.inputs * layer.outputs, kProductsOfThread);
  // Of many rows of few outputs, each thread has some rows; else, each reads its part of the weight.
  if (layer.rows > layer.outputs) {
    for_pieces(layer.rows, std::min(pieces, layer.rows), kTileRows, [&](int64_t, int64_t begin, int64_t end) {
      if (begin < end) kernels().half_linear(layer, begin, end, 0, layer.outputs);
    });
  } else {
    for_pieces(layer.outputs, std::min(pieces, layer.outputs), kTileOutputs,
               [&](int64_t, int64_t first, int64_t last) {
                 if (first < last) kernels().half_linear(layer, 0, layer.rows, first, last);
               });
  }
}

}  // namespace fastquant
