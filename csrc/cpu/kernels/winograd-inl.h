// Transforms of Winograd's convolutions (../winograd.h), and copies between images and pixels of channels.
//
// Vectors are of channels. Every result is computed by the same additions in the same order on every
// instruction set, so it has the same bits.
#pragma once

#include "../kernels.h"
#include "../quantized/kernels/unrolled-inl.h"
#include "prefetch-inl.h"

namespace fastquant {
namespace {

// ---------------------------------------------------------------------------- transforms

// Applies f, which makes kTo values of kFrom, to the columns and then to the rows of a matrix.
template <class V, int kFrom, int kTo, class F>
FASTQUANT_INLINE void transform_matrix(const typename V::Reg* from, typename V::Reg* to, const F& f) {
  typename V::Reg half[kTo * kFrom];
  unrolled<kFrom>([&](auto column) FASTQUANT_INLINE_LAMBDA {
    typename V::Reg in[kFrom], out[kTo];
    unrolled<kFrom>([&](auto r) FASTQUANT_INLINE_LAMBDA { in[r] = from[r * kFrom + column]; });
    f(in, out);
    unrolled<kTo>([&](auto r) FASTQUANT_INLINE_LAMBDA { half[r * kFrom + column] = out[r]; });
  });
  unrolled<kTo>([&](auto row) FASTQUANT_INLINE_LAMBDA { f(half + row * kFrom, to + row * kTo); });
}

// Makes a sum that is 0 while all x are finite, and NaN from the first other one on.
template <class V>
FASTQUANT_INLINE typename V::Reg add_nonfinite(typename V::Reg x, typename V::Reg sum) {
  return V::madd(x, V::set1(0.0f), sum);
}

template <class V>
void winograd_input(const float* const* pixels, int64_t channels, float* to, int64_t apart,
                    int64_t panel_stride) {
  using Reg = typename V::Reg;
  for (int64_t c = 0; c < channels; c += V::N) {
    Reg d[16], v[16];
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { d[i] = V::load(pixels[i] + c); });
    transform_matrix<V, 4, 4>(d, v, [](const Reg* x, Reg* y) FASTQUANT_INLINE_LAMBDA {
      y[0] = V::sub(x[0], x[2]);
      y[1] = V::add(x[1], x[2]);
      y[2] = V::sub(x[2], x[1]);
      y[3] = V::sub(x[1], x[3]);
    });
    float* const place = to + c / kWinogradPanel * panel_stride + c % kWinogradPanel;
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(place + i * apart, v[i]); });
  }
}

template <class V>
void winograd_gradient(const float* const* pixels, int64_t channels, float* to, int64_t apart) {
  using Reg = typename V::Reg;
  for (int64_t c = 0; c < channels; c += V::N) {
    Reg d[4], v[16];
    unrolled<4>([&](auto i) FASTQUANT_INLINE_LAMBDA { d[i] = V::load(pixels[i] + c); });
    transform_matrix<V, 2, 4>(d, v, [](const Reg* x, Reg* y) FASTQUANT_INLINE_LAMBDA {
      y[0] = x[0];
      y[1] = V::add(x[0], x[1]);
      y[2] = V::sub(x[0], x[1]);
      y[3] = V::sub(V::set1(0.0f), x[1]);
    });
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(to + c + i * apart, v[i]); });
  }
}

template <class V>
bool winograd_output(const float* from, int64_t apart, int64_t channels, const float* bias,
                     float* const* pixels) {
  using Reg = typename V::Reg;
  Reg nonfinite = V::set1(0.0f);
  for (int64_t c = 0; c < channels; c += V::N) {
    Reg m[16], y[4];
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { m[i] = V::load(from + c + i * apart); });
    transform_matrix<V, 4, 2>(m, y, [](const Reg* x, Reg* out) FASTQUANT_INLINE_LAMBDA {
      out[0] = V::add(V::add(x[0], x[1]), x[2]);
      out[1] = V::sub(V::sub(x[1], x[2]), x[3]);
    });
    unrolled<4>([&](auto i) FASTQUANT_INLINE_LAMBDA {
      const Reg result = bias == nullptr ? y[i] : V::add(y[i], V::load(bias + c));
      nonfinite = add_nonfinite<V>(result, nonfinite);
      V::store(pixels[i] + c, result);
    });
  }
  return !V::any(V::unordered(nonfinite, nonfinite));
}

// ---------------------------------------------------------------------------- transposition

// Of N vectors.
template <class V>
FASTQUANT_INLINE void transpose_vectors(typename V::Reg* x) {
  constexpr int N = V::N;
  typename V::Reg zipped[N];
  constexpr int kSteps = N == 16 ? 4 : N == 8 ? 3 : N == 4 ? 2 : N == 2 ? 1 : 0;
  unrolled<kSteps>([&](auto) FASTQUANT_INLINE_LAMBDA {
    unrolled<N / 2>([&](auto i) FASTQUANT_INLINE_LAMBDA {
      zipped[2 * i] = V::zip_low(x[i], x[i + N / 2]);
      zipped[2 * i + 1] = V::zip_high(x[i], x[i + N / 2]);
    });
    unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { x[i] = zipped[i]; });
  });
}

// y[c, r] = x[r, c]. Blocks of N rows and columns may overlap.
template <class V>
void transpose_matrix(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y,
                      int64_t y_stride) {
  constexpr int N = V::N;
  if (rows < N || columns < N) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) y[c * y_stride + r] = x[r * x_stride + c];
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += N) {
    const int64_t row = smaller(r, rows - N);
    for (int64_t c = 0; c < columns; c += N) {
      const int64_t column = smaller(c, columns - N);
      typename V::Reg block[N];
      const float* const from = x + row * x_stride + column;
      float* const to = y + column * y_stride + row;
      unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { block[i] = V::load(from + i * x_stride); });
      transpose_vectors<V>(block);
      unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(to + i * y_stride, block[i]); });
    }
  }
}

// ---------------------------------------------------------------------------- weights

constexpr int kWinogradTaps = 9;

// The taps of N outputs, whose weights begin `stride` elements apart.
template <class V>
FASTQUANT_INLINE void load_taps(const float* weight, int64_t stride, const float* end, int64_t outputs,
                                typename V::Reg* taps) {
  constexpr int N = V::N;
  if constexpr (N > kWinogradTaps) {
    if (outputs >= N && weight + (N - 1) * stride + N <= end) {
      typename V::Reg rows[N];
      unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { rows[i] = V::load(weight + i * stride); });
      transpose_vectors<V>(rows);
      unrolled<kWinogradTaps>([&](auto i) FASTQUANT_INLINE_LAMBDA { taps[i] = rows[i]; });
      return;
    }
  }
  float copied[kWinogradTaps * N] = {};
  for (int64_t o = 0; o < N && o < outputs; ++o) {
    for (int64_t t = 0; t < kWinogradTaps; ++t) copied[t * N + o] = weight[o * stride + t];
  }
  unrolled<kWinogradTaps>([&](auto i) FASTQUANT_INLINE_LAMBDA { taps[i] = V::load(copied + i * N); });
}

template <class V, bool kTurned>
void winograd_weights_of(const WinogradWeights& w, int64_t first, float* to) {
  using Reg = typename V::Reg;
  const int64_t apart = w.inputs * kWinogradPanel;
  for (int64_t o = 0; o < kWinogradPanel; o += V::N) {
    for (int64_t i = 0; i < w.inputs; ++i) {
      Reg taps[kWinogradTaps], g[kWinogradTaps], u[16];
      load_taps<V>(w.weight + (first + o) * w.output_stride + i * w.input_stride, w.output_stride, w.end,
                   w.outputs - first - o, taps);
      unrolled<kWinogradTaps>([&](auto t) FASTQUANT_INLINE_LAMBDA {
        constexpr int kTap = t;
        g[t] = taps[kTurned ? kWinogradTaps - 1 - kTap : kTap];
      });
      transform_matrix<V, 3, 4>(g, u, [](const Reg* x, Reg* y) FASTQUANT_INLINE_LAMBDA {
        const Reg half = V::set1(0.5f), outer = V::add(x[0], x[2]);
        y[0] = x[0];
        y[1] = V::mul(half, V::add(outer, x[1]));
        y[2] = V::mul(half, V::sub(outer, x[1]));
        y[3] = x[2];
      });
      float* const place = to + i * kWinogradPanel + o;
      unrolled<16>([&](auto k) FASTQUANT_INLINE_LAMBDA { V::store(place + k * apart, u[k]); });
    }
  }
}

template <class V>
void winograd_weights(const WinogradWeights& w, int64_t first, float* to) {
  if (w.turned) return winograd_weights_of<V, true>(w, first, to);
  winograd_weights_of<V, false>(w, first, to);
}

template <class V>
bool winograd_weight_gradient(const float* sums, int64_t apart, int64_t parts, int64_t part_stride, float* to) {
  using Reg = typename V::Reg;
  constexpr int N = V::N;
  Reg nonfinite = V::set1(0.0f);
  for (int64_t c = 0; c < kPositionUnit; c += N) {
    Reg m[16], g[kWinogradTaps];
    unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA { m[i] = V::load(sums + c + i * apart); });
    for (int64_t p = 1; p < parts; ++p) {
      unrolled<16>([&](auto i) FASTQUANT_INLINE_LAMBDA {
        m[i] = V::add(m[i], V::load(sums + p * part_stride + c + i * apart));
      });
    }
    transform_matrix<V, 4, 3>(m, g, [](const Reg* x, Reg* y) FASTQUANT_INLINE_LAMBDA {
      const Reg half = V::set1(0.5f), middle = V::mul(half, V::add(x[1], x[2]));
      y[0] = V::add(x[0], middle);
      y[1] = V::mul(half, V::sub(x[1], x[2]));
      y[2] = V::add(middle, x[3]);
    });
    unrolled<kWinogradTaps>([&](auto i)
                                FASTQUANT_INLINE_LAMBDA { nonfinite = add_nonfinite<V>(g[i], nonfinite); });
    if constexpr (N > kWinogradTaps) {
      Reg rows[N];
      unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { rows[i] = g[i < kWinogradTaps ? int(i) : 0]; });
      transpose_vectors<V>(rows);
      unrolled<N>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(to + (c + i) * kWinogradTaps, rows[i]); });
    } else {
      float copied[kWinogradTaps * N];
      unrolled<kWinogradTaps>([&](auto i) FASTQUANT_INLINE_LAMBDA { V::store(copied + i * N, g[i]); });
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t t = 0; t < kWinogradTaps; ++t) to[(c + i) * kWinogradTaps + t] = copied[t * N + i];
      }
    }
  }
  return !V::any(V::unordered(nonfinite, nonfinite));
}

template <class V>
constexpr WinogradKernels winograd_kernels() {
  return {winograd_input<V>,   winograd_gradient<V>,        winograd_output<V>,
          winograd_weights<V>, winograd_weight_gradient<V>, transpose_matrix<V>};
}

}  // namespace
}  // namespace fastquant
