// The error of a tensor that was quantized, on plain memory, in parallel.
#include "errors.h"

#include <array>

#include "quant_params.h"
#include "quantized/elementwise.h"
#include "quantized/kernels.h"

namespace fastquant {
namespace {

using Sums = std::array<double, kErrorSums>;

// The length of the parts that are summed one by one, whatever the number of threads.
constexpr int64_t kPart = 65536;
// Elements whose rounded values stay in the L1 cache.
constexpr int64_t kBlock = 2048;

void add_block(const float* reference, const float* x, int64_t n, Sums* sums) {
  double found[3];
  kernels().error_sums(reference, x, n, found);
  int64_t pairs = n;
  // The sum of squares of fp32 numbers is finite in fp64.
  if (!std::isfinite(found[0] + found[1] + found[2])) {
    pairs = 0;
    found[0] = found[1] = found[2] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(reference[i]) || !std::isfinite(x[i])) continue;
      double one[3];
      kernels().error_sums(reference + i, x + i, 1, one);
      for (int s = 0; s < 3; ++s) found[s] += one[s];
      ++pairs;
    }
  }
  (*sums)[kPairs] += static_cast<double>(pairs);
  (*sums)[kSignal] += found[0];
  (*sums)[kNoise] += found[1];
  (*sums)[kShared] += found[2];
}

// Calls block(begin, length, its part's sums, piece) for all blocks, and adds up the sums of the parts.
template <class F>
void for_blocks(int64_t n, int64_t pieces, double* sums, const F& block) {
  const int64_t count = (n + kPart - 1) / kPart;
  std::vector<Sums> parts(count, Sums{});
  for_pieces(count, pieces, 1, [&](int64_t piece, int64_t first, int64_t last) {
    for (int64_t i = first * kPart; i < std::min(n, last * kPart); i += kBlock) {
      block(i, std::min(kBlock, n - i), &parts[i / kPart], piece);
    }
  });
  for (const Sums& part : parts) {
    for (int s = 0; s < kErrorSums; ++s) sums[s] += part[s];
  }
}

}  // namespace

void observe_error(const float* reference, const float* x, int64_t n, const std::optional<RoundedTo>& grid,
                   double* sums, uint8_t* integers) {
  const int64_t pieces = piece_count(n);
  if (!grid.has_value()) {
    for_blocks(n, pieces, sums, [&](int64_t i, int64_t length, Sums* part, int64_t) {
      add_block(reference + i, x + i, length, part);
    });
    return;
  }
  float scale = grid->scale;
  int64_t zero_point = grid->zero_point;
  const TensorParams<float> params(kBlock, {&scale, Element::f32, 1, "scale"},
                                   {&zero_point, Element::i64, 1, "zero_point"}, grid->quant_min,
                                   grid->quant_max);
  check(integers == nullptr || !params.get().exact, "scale must be a normal number to count integers");
  // With an entry for elements that are not finite.
  const int64_t entries = integers == nullptr ? 0 : grid->levels() + 1;
  std::vector<std::vector<uint8_t>> used(pieces, std::vector<uint8_t>(entries));
  for_blocks(n, pieces, sums, [&](int64_t i, int64_t length, Sums* part, int64_t piece) {
    float rounded[kBlock];
    kernels().f32.fake_quantize_rows(x + i, rounded, nullptr, 0, length, params.get());
    add_block(reference + i, rounded, length, part);
    if (integers == nullptr) return;
    (*part)[kClipped] +=
        static_cast<double>(kernels().mark_integers(reference + i, length, params.get(), used[piece].data()));
  });
  for (const auto& of_piece : used) {
    for (int64_t k = 0; k + 1 < entries; ++k) integers[k] |= of_piece[k];
  }
}

void observe_error(const float* reference, const uint8_t* x, int64_t n, const Quantization& q, double* sums) {
  const Operand operand = {static_cast<float>(q.scale), zero_point_of_bytes(q.zero_point, q.is_signed),
                           flip_of(q.is_signed)};
  const auto dequantize_block = quantized_kernels().elementwise->f32.dequantize;
  for_blocks(n, piece_count(n), sums, [&](int64_t i, int64_t length, Sums* part, int64_t) {
    float real[kBlock];
    dequantize_block(x + i, real, length, operand);
    add_block(reference + i, real, length, part);
  });
}

}  // namespace fastquant
