#include "half_linear.h"

#include "arrays.h"

namespace fastquant {

void half_linear(const HalfLinear& layer) {
  // A product takes a quarter of the time that writing an element does.
  constexpr int64_t kProductsOfThread = 4 * kGrain;
  const int64_t pieces = piece_count(layer.rows * layer.inputs * layer.outputs, kProductsOfThread);
  for_pieces(layer.outputs, std::min(pieces, layer.outputs), 4, [&](int64_t, int64_t first, int64_t last) {
    if (first < last) kernels().half_linear(layer, first, last);
  });
}

}  // namespace fastquant
