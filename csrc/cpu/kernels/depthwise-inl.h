// Depthwise convolutions of planes, and their gradients, computed in fp32.
//
// Each element of the output, or of the gradient of the input, is one chain of fused multiplications and
// additions, from the kernel's first tap to its last, without those beyond an edge. The gradient of a tap is
// summed in kTapLanes lanes, then over these. So results are the same on every instruction set.
#pragma once

#include "../kernels.h"
#include "../quantized/kernels/unrolled-inl.h"

// The innermost loops are functions of their own: only then do all of their vectors stay in registers.
#define FASTQUANT_NOINLINE __attribute__((noinline))

namespace fastquant {
namespace {

template <class V, class S>
void copy_values(const S* x, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) V::store(to + i, V::load(x + i));
  for (; i < n; ++i) to[i] = to_compute(x[i]);
}

// Goes through the rows of planes and the phases for a stride of 2. Calls vectors(x, even, odd) for 2 N
// elements of a row and N each of the phases with its even and odd ones; or element(x, of_phase) for single
// ones, where memory ends. Vectors may go beyond the end of a row: what follows is the next row or plane, which
// comes later.
template <class V, class X, class P, class Vectors, class Element>
FASTQUANT_INLINE void for_phases(const DepthwisePlane& plane, int64_t planes, X* x, P* phases,
                                 const Vectors& vectors, const Element& element) {
  // Sizes as variables, because for all the compiler knows, stores into memory may change the plane.
  const int64_t height = plane.height, width = plane.width, columns = plane.columns;
  const int64_t apart = plane.phase_stride(), outputs = plane.outputs();
  const X* const end = x + planes * height * width;
  for (int64_t p = 0; p < planes; ++p, phases += outputs) {
    for (int64_t r = 0; r < height; ++r, x += width) {
      P* const even = phases + r % 2 * 2 * apart + r / 2 * columns;
      P* const odd = even + apart;
      int64_t c = 0;
      for (; c < columns && 2 * (c + V::N) <= end - x; c += V::N) vectors(x + 2 * c, even + c, odd + c);
      for (; c < columns; ++c) {
        element(x + 2 * c, even + c);
        if (2 * c + 1 < width) element(x + 2 * c + 1, odd + c);
      }
    }
  }
}

template <class V, class S>
void split_planes(const DepthwisePlane& plane, int64_t planes, const S* x, float* phases) {
  for_phases<V>(
      plane, planes, x, phases,
      [](const S* from, float* even, float* odd) FASTQUANT_INLINE_LAMBDA {
        const auto a = V::load(from), b = V::load(from + V::N);
        V::store(even, V::even(a, b));
        V::store(odd, V::odd(a, b));
      },
      [](const S* from, float* to) FASTQUANT_INLINE_LAMBDA { *to = to_compute(*from); });
}

template <class V, class S>
void join_phases(const DepthwisePlane& plane, int64_t planes, const float* phases, S* x) {
  for_phases<V>(
      plane, planes, x, phases,
      [](S* to, const float* even, const float* odd) FASTQUANT_INLINE_LAMBDA {
        const auto a = V::load(even), b = V::load(odd);
        V::store(to, V::zip_low(a, b));
        V::store(to + V::N, V::zip_high(a, b));
      },
      [](S* to, const float* from) FASTQUANT_INLINE_LAMBDA { from_compute(to, *from); });
}

// At which of N positions a tap counts. word: where the masks of a group begin.
template <class V, Edges kEdges, int K>
FASTQUANT_INLINE uint32_t tap_bits(const uint16_t* word, int row, int column, int first_lane) {
  const uint32_t columns = word[1 + K + column];
  return (kEdges == Edges::both ? columns & word[1 + row] : columns) >> first_lane;
}

// sum + a * b at these.
template <class V, Edges kEdges>
FASTQUANT_INLINE typename V::Reg add_product(typename V::Reg a, typename V::Reg b, typename V::Reg sum,
                                             uint32_t bits) {
  const auto next = V::madd(a, b, sum);
  return kEdges == Edges::none ? next : V::select(V::from_bits(bits), next, sum);
}

// Calls f with the edges of a group as a constant.
template <class F>
FASTQUANT_INLINE void with_edges(uint16_t edges, const F& f) {
  if (edges == uint16_t(Edges::none)) {
    f(Index<int(Edges::none)>());
  } else if (edges == uint16_t(Edges::columns)) {
    f(Index<int(Edges::columns)>());
  } else {
    f(Index<int(Edges::both)>());
  }
}

// Adds the products of taps and weights, for N positions. rows: where each row of the taps begins in each phase
// of columns that is read. Forward, the products are summed for one position; backward, for one of each phase.
template <class V, int K, int kStride, bool kForward, Edges kEdges>
FASTQUANT_INLINE void add_taps(const float* const* rows, int64_t at, const typename V::Reg* weights,
                               const uint16_t* masks, int first_lane, typename V::Reg* sums) {
  unrolled<K * K>([&](auto t) FASTQUANT_INLINE_LAMBDA {
    constexpr int kRow = t / K, kColumn = t % K;
    constexpr int kRowPhase = tap_phase(kRow, K, kStride), kPhase = tap_phase(kColumn, K, kStride);
    constexpr int kShift = tap_shift(kColumn, K, kStride);
    const auto tap =
        kForward ? V::load(rows[kRow * kStride + kPhase] + at + kShift) : V::load(rows[kRow] + at - kShift);
    auto& sum = sums[kForward ? 0 : kRowPhase * kStride + kPhase];
    sum =
        add_product<V, kEdges>(tap, weights[t], sum, tap_bits<V, kEdges, K>(masks, kRow, kColumn, first_lane));
  });
}

// All positions: forward, of an output of which `from` has the phases of the input; backward, of the phases of
// an input of which `from` has the gradient of the output. `count` positions are written to `to`, in phases
// that are `apart` elements apart.
template <class V, int K, int kStride, bool kForward, class S>
FASTQUANT_NOINLINE void correlate(const DepthwisePlane& plane, const float* from, const float* weight,
                                  float start, S* to, int64_t count, int64_t apart) {
  constexpr int kRead = kForward ? kStride : 1, kWritten = kForward ? 1 : kStride * kStride;
  const float* rows[K * kRead];
  unrolled<K * kRead>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    constexpr int k = r / kRead, kPhase = tap_phase(k, K, kStride) * kStride + r % kRead;
    const int64_t shift = tap_shift(k, K, kStride) * plane.columns;
    rows[r] = kForward ? from + kPhase * plane.phase_stride() + shift : from - shift;
  });
  typename V::Reg weights[K * K];
  unrolled<K * K>([&](auto t) FASTQUANT_INLINE_LAMBDA { weights[t] = V::set1(weight[t]); });
  const uint16_t* masks = plane.masks;
  // The positions from `at`, of which `written` is where to write those of the first phase.
  const auto write = [&](auto edges, int64_t at, S* written) FASTQUANT_INLINE_LAMBDA {
    constexpr auto kEdges = Edges(int(edges));
    for (int lane = 0; lane < kTapLanes; lane += V::N) {
      typename V::Reg sums[kWritten];
      unrolled<kWritten>([&](auto p) FASTQUANT_INLINE_LAMBDA { sums[p] = V::set1(start); });
      add_taps<V, K, kStride, kForward, kEdges>(rows, at + lane, weights, masks, lane, sums);
      unrolled<kWritten>([&](auto p)
                             FASTQUANT_INLINE_LAMBDA { V::store(written + p * apart + lane, sums[p]); });
    }
  };
  int64_t at = 0;
  for (; at + kTapLanes <= count; at += kTapLanes, masks += 1 + 2 * K) {
    with_edges(masks[0], [&](auto edges) FASTQUANT_INLINE_LAMBDA { write(edges, at, to + at); });
  }
  if (at < count) {  // of one phase
    S rest[kTapLanes];
    write(Index<int(Edges::both)>(), at, rest);
    for (int64_t i = at; i < count; ++i) to[i] = rest[i - at];
  }
}

// Adds to `sums` the gradients of the taps of kRows rows of the kernel, by the groups [begin, end) of positions
// of a plane. x: its phases, or the plane itself. At whole_groups, memory that may be read ends within a group.
template <class V, int K, int kStride, int kRows, class S>
FASTQUANT_NOINLINE void add_tap_gradients(const DepthwisePlane& plane, const float* grad, const S* x,
                                          int first_row, int64_t begin, int64_t end, int64_t whole_groups,
                                          double* sums) {
  const float* grad_rows[kRows];
  const S* x_rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    grad_rows[r] = grad - tap_shift(first_row + r, K, kStride) * plane.columns;
    x_rows[r] = x + tap_phase(first_row + r, K, kStride) * kStride * plane.phase_stride();
  }
  float lanes[kRows * K + 2][kTapLanes] = {};
  S last[kTapLanes] = {};
  if (whole_groups < end) {
    for (int64_t i = whole_groups * kTapLanes; i < plane.outputs(); ++i) last[i % kTapLanes] = x[i];
  }
  for (int lane = 0; lane < kTapLanes; lane += V::N) {
    typename V::Reg totals[kRows * K];
    unrolled<kRows * K>([&](auto t) FASTQUANT_INLINE_LAMBDA { totals[t] = V::set1(0.0f); });
    const uint16_t* masks = plane.masks + begin * (1 + 2 * K);
    for (int64_t g = begin; g < end; ++g, masks += 1 + 2 * K) {
      const int64_t at = g * kTapLanes + lane;
      with_edges(masks[0], [&](auto edges) FASTQUANT_INLINE_LAMBDA {
        constexpr auto kEdges = Edges(int(edges));
        unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
          typename V::Reg values[kStride];
          unrolled<kStride>([&](auto p) FASTQUANT_INLINE_LAMBDA {
            values[p] = V::load(g < whole_groups ? x_rows[r] + p * plane.phase_stride() + at : last + lane);
          });
          unrolled<K>([&](auto k) FASTQUANT_INLINE_LAMBDA {
            constexpr int kColumn = k;
            auto& total = totals[r * K + k];
            total = add_product<V, kEdges>(V::load(grad_rows[r] + at - tap_shift(kColumn, K, kStride)),
                                           values[tap_phase(kColumn, K, kStride)], total,
                                           tap_bits<V, kEdges, K>(masks, first_row + r, kColumn, lane));
          });
        });
      });
    }
    unrolled<kRows * K>([&](auto t) FASTQUANT_INLINE_LAMBDA { V::store(lanes[t] + lane, totals[t]); });
  }
  // Of all taps, neighbours are added, until one is left of each.
  float* const flat = lanes[0];
  for (int64_t n = kRows * K * kTapLanes / 2; n >= kRows * K; n /= 2) {
    for (int64_t i = 0; i < n; i += V::N) {
      const auto a = V::load(flat + 2 * i), b = V::load(flat + 2 * i + V::N);
      V::store(flat + i, V::add(V::even(a, b), V::odd(a, b)));
    }
  }
  for (int t = 0; t < kRows * K; ++t) sums[first_row * K + t] += static_cast<double>(flat[t]);
}

// How many positions of plane p may be written (or read) where `planes` of them follow each other: whole
// groups, unless memory ends within the last.
inline int64_t whole_positions(const DepthwisePlane& plane, int64_t p, int64_t planes) {
  const int64_t all = plane.lane_groups() * kTapLanes;
  return p * plane.outputs() + all <= planes * plane.outputs() ? all : plane.outputs();
}

// Calls f(first, count) for planes that are taken at once.
template <class F>
void for_planes_at_once(const DepthwisePlane& plane, int64_t planes, const F& f) {
  const int64_t at_once = plane.at_once();
  for (int64_t p = 0; p < planes; p += at_once) f(p, planes - p < at_once ? planes - p : at_once);
}

template <class V, int K, int kStride, class S>
void depthwise_forward_of(const DepthwisePlane& plane, int64_t planes, const S* x, const float* weight,
                          const float* bias, S* y, float* scratch) {
  float* const phases = scratch + plane.margin();
  const int64_t outputs = plane.outputs();
  for_planes_at_once(plane, planes, [&](int64_t first, int64_t count) {
    const S* const from = x + first * plane.inputs();
    if constexpr (kStride == 1) {
      copy_values<V>(from, phases, count * outputs);
    } else {
      split_planes<V>(plane, count, from, phases);
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t channel = first + p;
      correlate<V, K, kStride, true>(plane, phases + p * outputs, weight + channel * K * K,
                                     bias == nullptr ? 0.0f : bias[channel], y + channel * outputs,
                                     whole_positions(plane, p, count), 0);
    }
  });
}

// The gradients of the weights of planes. values: the gradient of the output; x: phases, or the planes
// themselves.
template <class V, int K, int kStride, class S>
void weight_gradients(const DepthwisePlane& plane, int64_t planes, const float* values, const S* x,
                      double* grad_weight) {
  constexpr int kRows = K == 3 ? 3 : 1;  // so many that sums stay in registers
  constexpr int64_t kLongest = 1024;     // sums in fp32
  const int64_t groups = plane.lane_groups(), outputs = plane.outputs();
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t whole_groups = kStride > 1 ? groups : whole_positions(plane, p, planes) / kTapLanes;
    for (int64_t g = 0; g < groups; g += kLongest) {
      const int64_t end = g + kLongest < groups ? g + kLongest : groups;
      for (int r = 0; r < K; r += kRows) {
        add_tap_gradients<V, K, kStride, kRows>(plane, values + p * outputs, x + p * outputs, r, g, end,
                                                whole_groups, grad_weight + p * K * K);
      }
    }
  }
}

template <class V, int K, int kStride, class S>
void depthwise_backward_of(const DepthwisePlane& plane, int64_t planes, const S* grad, const S* x,
                           const float* weight, S* grad_x, double* grad_weight, float* scratch) {
  float* const values = scratch + plane.margin();
  float* const phases = values + plane.phase_stride();
  const int64_t outputs = plane.outputs();
  for_planes_at_once(plane, planes, [&](int64_t first, int64_t count) {
    // Copied: what lies around the planes is read, too, and grad_x may take their place.
    copy_values<V>(grad + first * outputs, values, count * outputs);
    const S* const inputs = x + first * plane.inputs();
    if (grad_weight != nullptr) {
      double* const sums = grad_weight + first * K * K;
      if constexpr (kStride == 1) {
        weight_gradients<V, K, kStride>(plane, count, values, inputs, sums);
      } else {
        split_planes<V>(plane, count, inputs, phases);
        weight_gradients<V, K, kStride, float>(plane, count, values, phases, sums);
      }
    }
    if (grad_x == nullptr) return;
    S* const of_inputs = grad_x + first * plane.inputs();
    for (int64_t p = 0; p < count; ++p) {
      const float* const w = weight + (first + p) * K * K;
      const float* const from = values + p * outputs;
      if constexpr (kStride == 1) {
        correlate<V, K, kStride, false>(plane, from, w, 0.0f, of_inputs + p * outputs,
                                        whole_positions(plane, p, count), 0);
      } else {
        correlate<V, K, kStride, false>(plane, from, w, 0.0f, phases + p * outputs,
                                        plane.lane_groups() * kTapLanes, plane.phase_stride());
      }
    }
    if constexpr (kStride == 2) join_phases<V>(plane, count, phases, of_inputs);
  });
}

// Calls f with the kernel's size and the stride as constants.
template <class F>
void with_kernel(const DepthwisePlane& plane, const F& f) {
  const auto with_stride = [&](auto kernel) {
    if (plane.stride == 1) return f(kernel, Index<1>());
    f(kernel, Index<2>());
  };
  if (plane.kernel == 3) return with_stride(Index<3>());
  if (plane.kernel == 5) return with_stride(Index<5>());
  with_stride(Index<7>());
}

template <class V, class S>
void depthwise_forward(const DepthwisePlane& plane, int64_t planes, const S* x, const float* weight,
                       const float* bias, S* y, float* scratch) {
  with_kernel(plane, [&](auto kernel, auto stride) {
    constexpr int K = kernel, kStride = stride;
    depthwise_forward_of<V, K, kStride>(plane, planes, x, weight, bias, y, scratch);
  });
}

template <class V, class S>
void depthwise_backward(const DepthwisePlane& plane, int64_t planes, const S* grad, const S* x,
                        const float* weight, S* grad_x, double* grad_weight, float* scratch) {
  with_kernel(plane, [&](auto kernel, auto stride) {
    constexpr int K = kernel, kStride = stride;
    depthwise_backward_of<V, K, kStride>(plane, planes, grad, x, weight, grad_x, grad_weight, scratch);
  });
}

template <class V, class S>
constexpr PlaneKernels<S> depthwise_kernels() {
  return {depthwise_forward<V, S>, depthwise_backward<V, S>};
}

}  // namespace
}  // namespace fastquant
