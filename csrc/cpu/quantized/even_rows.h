// The values of a convolution as EvenRows (matrix_kernels.h): where they lie in x, or in a copy that has
// padding between its lines. So nothing is copied for each position, and there are no pointers to find.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "convolution.h"
#include "matrix_kernels.h"
#include "packing.h"

namespace fastquant {

class EvenConvolution {
 public:
  // s: as simplified in convolution.cpp.
  EvenConvolution(const uint8_t* x, uint8_t zero_point, const ConvShape& s, const PackedLayout& layout)
      : x_(x), zero_point_(zero_point), s_(s), steps_(layout.row_steps()) {
    const int64_t reach = (s.kernel[2] - 1) * s.dilation[2] + 1;
    const int64_t right = (s.out[2] - 1) * s.stride[2] + reach - s.padding[2] - s.in[2];
    const bool overhangs = s.kernel[2] * s.in_channels % kStep != 0;
    in_x_ = s.padding[1] == 0 && s.padding[2] == 0 && !overhangs;
    // Padding behind a line is that before the next one, too.
    pitch_ = in_x_ ? s.in[2] : s.in[2] + std::max<int64_t>({s.padding[2], right, 0});
    // Where positions of neighbouring lines are as far apart as those of one, all lines are one stretch.
    joined_ = s.stride[1] == 1 && s.stride[2] == 1;
    if (joined_) pitch_ = std::max(pitch_, s.out[2]);
    at_once_ = layout.bytes() > kSecondCache ? kSecondCache : kFewAtOnce;
  }

  // Whether tiles would not be nearly empty.
  bool possible() const {
    const bool flat = s_.kernel[0] == 1 && s_.in[0] == 1 && s_.out[0] == 1;
    const bool adjacent = s_.dilation[2] == 1 || s_.kernel[2] == 1;
    return flat && adjacent && s_.groups == 1 &&
           fits_even_rows(joined_ ? s_.out[1] * s_.out[2] : s_.out[2], s_.kernel[1], steps_);
  }

  // The positions that pieces of a convolution consist of.
  int64_t unit() const { return one_line() ? kRowUnit : s_.out[2]; }

  // Calls f(rows, first position) until all positions [begin, end) are done.
  template <class F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    if (one_line()) return for_positions(begin, end, f);
    const int64_t bytes = pitch_ * s_.in_channels, fitting = at_once_ / bytes;
    const int64_t lines = std::max<int64_t>((fitting - reach()) / s_.stride[1] + 1, 1);
    const int64_t images = joined_ ? std::max<int64_t>(fitting / rows_of(s_.out[1]), 1) : 1;
    const int64_t last = end / s_.out[2];
    const Copy copy(in_x_ ? 0 : std::max(images * rows_of(s_.out[1]), rows_of(lines)) * bytes + margin());
    for (int64_t line = begin / s_.out[2]; line < last;) {
      const int64_t y = line % s_.out[1], image = line / s_.out[1], left = last - line;
      const int64_t count = std::min({lines, s_.out[1] - y, left});
      const int64_t whole = count == s_.out[1] ? std::min(images, left / s_.out[1]) : 1;
      f(rows(image, whole, y, count, copy.get()), line * s_.out[2]);
      line += whole * count;
    }
  }

 private:
  // Bytes of values to copy and multiply at once: more where weights come from far away each time. malloc
  // requests larger memory from the system, at each call anew.
  static constexpr int64_t kFewAtOnce = 98304;

  // Memory that begins with a cache line, so that values of 64 channels are in one.
  class Copy {
   public:
    explicit Copy(int64_t size) : memory_(size == 0 ? nullptr : new uint8_t[size + kLine - 1]) {}
    uint8_t* get() const {
      const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
      return reinterpret_cast<uint8_t*>((address + kLine - 1) / kLine * kLine);
    }

   private:
    static constexpr uintptr_t kLine = 64;
    std::unique_ptr<uint8_t[]> memory_;
  };

  bool one_line() const {
    return s_.in[1] == 1 && s_.batch == 1 && s_.kernel[1] == 1 && s_.kernel[2] == 1 && s_.stride[2] == 1 &&
           s_.padding[1] == 0 && s_.padding[2] == 0;
  }

  int64_t reach() const { return (s_.kernel[1] - 1) * s_.dilation[1] + 1; }
  // Lines of values that so many lines of outputs need.
  int64_t rows_of(int64_t lines) const { return (lines - 1) * s_.stride[1] + reach(); }
  // Of a copy: padding before the first line, and what may be read behind the last one.
  int64_t margin() const { return s_.padding[2] * s_.in_channels + kStep; }

  template <class F>
  void for_positions(int64_t begin, int64_t end, const F& f) const {
    const int64_t c = s_.in_channels;
    const int64_t most = std::max(at_once_ / c / kRowUnit * kRowUnit, kRowUnit);
    const Copy copy(in_x_ ? 0 : std::min(most, end - begin) * c + kStep);
    for (int64_t at = begin; at < end; at += most) {
      const int64_t count = std::min(most, end - at);
      if (!in_x_) {
        std::memcpy(copy.get(), x_ + at * c, count * c);
        std::memset(copy.get() + count * c, 0, kStep);
      }
      f(EvenRows{in_x_ ? x_ + at * c : copy.get(), 1, 0, count, c, 1, 0, steps_, count, count}, at);
    }
  }

  // `lines` lines from y on, of `images` images; of several, all lines.
  EvenRows rows(int64_t image, int64_t images, int64_t y, int64_t lines, uint8_t* copy) const {
    const int64_t bytes = pitch_ * s_.in_channels;
    const int64_t first_row = y * s_.stride[1] - s_.padding[1];
    const uint8_t* first = x_ + (image * s_.in[1] + first_row) * bytes;
    if (!in_x_) {
      first = copy;
      const int64_t before = s_.padding[2] * s_.in_channels;
      std::memset(copy, zero_point_, before);
      copy += before;
      for (int64_t i = image; i < image + images; ++i) {
        for (int64_t row = first_row; row < first_row + rows_of(lines); ++row, copy += bytes)
          copy_row(i, row, copy);
      }
      std::memset(copy, zero_point_, kStep);
    }
    EvenRows rows = {first,  1, 0, 0, s_.stride[2] * s_.in_channels, s_.kernel[1], s_.dilation[1] * bytes,
                     steps_, 0, 0};
    if (joined_) {
      rows.stretches = images, rows.stretch_stride = rows_of(lines) * bytes;
      rows.rows = (lines - 1) * pitch_ + s_.out[2], rows.line = pitch_, rows.kept = s_.out[2];
    } else {
      rows.stretches = lines, rows.stretch_stride = s_.stride[1] * bytes;
      rows.rows = rows.line = rows.kept = s_.out[2];
    }
    return rows;
  }

  void copy_row(int64_t image, int64_t row, uint8_t* to) const {
    const int64_t there = row < 0 || row >= s_.in[1] ? 0 : s_.in[2] * s_.in_channels;
    if (there > 0) std::memcpy(to, x_ + (image * s_.in[1] + row) * there, there);
    std::memset(to + there, zero_point_, pitch_ * s_.in_channels - there);
  }

  const uint8_t* x_;
  uint8_t zero_point_;
  const ConvShape& s_;
  int64_t steps_;  // of a row of the kernel
  bool in_x_;      // no copy is needed
  int64_t pitch_;  // positions from line to line
  bool joined_;
  int64_t at_once_;
};

}  // namespace fastquant
