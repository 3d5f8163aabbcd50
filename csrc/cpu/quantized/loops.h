// Loops over tensors of the same shape that lie in memory differently.
#pragma once

#include "../arrays.h"

namespace fastquant {

// The dimensions of `output` in the order of its memory, outermost first, for an output without gaps or a slice
// of one. Neighbours that all tensors can walk through as one are one; dimensions of one element are left out.
// kInputs inputs have the output's sizes, and a stride of 0 where they are broadcast. All elements have one
// byte.
template <int kInputs>
class Loops {
 public:
  static constexpr int kTensors = kInputs + 1;  // the output is the first

  Loops(int dims, const int64_t* sizes, const int64_t* const (&strides)[kTensors]) {
    check(dims <= kMaxDims, "tensors have too many dimensions");
    int order[kMaxDims];
    int count = 0;
    for (int d = 0; d < dims; ++d) {
      numel_ *= sizes[d];
      if (sizes[d] != 1) order[count++] = d;
    }
    std::stable_sort(order, order + count, [&](int a, int b) { return strides[0][a] > strides[0][b]; });
    for (int k = 0; k < count; ++k) {
      const int d = order[k];
      const bool merged = dims_ > 0 && [&] {
        for (int t = 0; t < kTensors; ++t) {
          if (strides_[t][dims_ - 1] != strides[t][d] * sizes[d]) return false;
        }
        return true;
      }();
      if (!merged) ++dims_;
      sizes_[dims_ - 1] = merged ? sizes_[dims_ - 1] * sizes[d] : sizes[d];
      for (int t = 0; t < kTensors; ++t) strides_[t][dims_ - 1] = strides[t][d];
    }
    if (dims_ == 0 || strides_[0][dims_ - 1] != 1) {
      sizes_[dims_] = dims_ == 0 ? numel_ : 1;
      for (int t = 0; t < kTensors; ++t) strides_[t][dims_] = 1;
      ++dims_;
    }
  }

  int64_t columns() const { return sizes_[dims_ - 1]; }
  // 0 where there are no elements.
  int64_t rows() const { return numel_ == 0 ? 0 : numel_ / columns(); }
  // The stride of a tensor inside a row, and from row to row.
  int64_t inner(int t) const { return strides_[t][dims_ - 1]; }
  int64_t outer(int t) const { return dims_ < 2 ? 0 : strides_[t][dims_ - 2]; }

  // Calls f(offsets, rows, columns), in parallel, for matrices that make up the tensors: offsets are those of
  // the first element of each tensor. `grain` is how many elements a thread must have.
  template <class F>
  void run(int64_t grain, const F& f) const {
    if (numel_ == 0) return;
    const int64_t pieces = piece_count(numel_, grain);
    if (dims_ == 1) {
      for_pieces(numel_, pieces, 64, [&](int64_t, int64_t begin, int64_t end) {
        int64_t offsets[kTensors];
        for (int t = 0; t < kTensors; ++t) offsets[t] = begin * strides_[t][0];
        if (begin < end) f(offsets, int64_t{1}, end - begin);
      });
      return;
    }
    for_pieces(rows(), std::min(pieces, rows()), 1,
               [&](int64_t, int64_t begin, int64_t end) { run_rows(begin, end, f); });
  }

  // The same for the rows [begin, end), on this thread. There must be elements, and more than one dimension.
  template <class F>
  void run_rows(int64_t begin, int64_t end, const F& f) const {
    const int64_t height = sizes_[dims_ - 2];
    while (begin < end) {
      const int64_t here = std::min(end - begin, height - begin % height);
      int64_t offsets[kTensors] = {}, rest = begin;
      for (int d = dims_ - 2; d >= 0; --d) {
        const int64_t at = rest % sizes_[d];
        rest /= sizes_[d];
        for (int t = 0; t < kTensors; ++t) offsets[t] += at * strides_[t][d];
      }
      f(offsets, here, columns());
      begin += here;
    }
  }

 private:
  int64_t numel_ = 1;
  int dims_ = 0;
  int64_t sizes_[kMaxDims + 1], strides_[kTensors][kMaxDims + 1];
};

}  // namespace fastquant
