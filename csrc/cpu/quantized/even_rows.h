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

  // Whether tiles would not be nearly empty, and few bytes are copied for the products.
  bool possible() const {
    const bool flat = s_.kernel[0] == 1 && s_.in[0] == 1 && s_.out[0] == 1 && s_.padding[0] == 0;
    const bool adjacent = s_.dilation[2] == 1 || s_.kernel[2] == 1;
    return flat && adjacent && s_.groups == 1 &&
           fits_even_rows(joined_ ? s_.out[1] * s_.out[2] : s_.out[2], s_.kernel[1], steps_) &&
           (in_x_ || copies_little());
  }

  // The positions that pieces of a convolution consist of.
  int64_t unit() const { return cuts_lines() ? kRowUnit : s_.out[2]; }

  // Calls f(rows, first position) until all positions [begin, end) are done.
  template <class F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    if (cuts_lines()) return for_positions(begin, end, f);
    const int64_t bytes = pitch_ * s_.in_channels, fitting = at_once_ / bytes, lines = lines_at_once();
    const int64_t images = joined_ ? std::clamp<int64_t>(fitting / rows_of(s_.out[1]), 1, s_.batch) : 1;
    const int64_t last = end / s_.out[2];
    const Copy copy(in_x_ ? 0 : (lines < s_.out[1] ? 1 : images) * rows_of(lines) * bytes + margin());
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

  // Positions of a line whose last tile may be nearly empty.
  static constexpr int64_t kLongLine = 256;

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

  // Lines that are all of their image are cut anywhere if they are long, or only one: else a long line would be
  // copied whole, and by one thread.
  bool cuts_lines() const {
    const bool alone = s_.in[1] == 1 && s_.kernel[1] == 1 && s_.padding[1] == 0;
    return alone && (s_.batch == 1 || s_.out[2] >= kLongLine);
  }

  int64_t reach() const { return (s_.kernel[1] - 1) * s_.dilation[1] + 1; }
  // Lines of values that so many lines of outputs need.
  int64_t rows_of(int64_t lines) const { return (lines - 1) * s_.stride[1] + reach(); }
  // Lines of outputs that are computed at once.
  int64_t lines_at_once() const {
    const int64_t fitting = at_once_ / (pitch_ * s_.in_channels);
    return std::clamp<int64_t>((fitting - reach()) / s_.stride[1] + 1, 1, s_.out[1]);
  }
  // Columns of values that so many positions of a line need.
  int64_t columns_of(int64_t positions) const { return (positions - 1) * s_.stride[2] + s_.kernel[2]; }
  // Of a copy: padding before the first line, and what may be read behind the last one.
  int64_t margin() const { return s_.padding[2] * s_.in_channels + kStep; }

  // Lines that no tap meets are copied, too: far too many where taps or positions are far apart. Where there is
  // more padding than a kernel is wide, lines may consist of little else.
  bool copies_little() const {
    const int64_t lines = lines_at_once();
    return rows_of(lines) <= 2 * s_.kernel[1] * lines && s_.padding[2] <= s_.kernel[2];
  }

  template <class F>
  void for_positions(int64_t begin, int64_t end, const F& f) const {
    const int64_t c = s_.in_channels, step = s_.stride[2] * c;
    const int64_t most = std::max(at_once_ / step / kRowUnit * kRowUnit, kRowUnit);
    const Copy copy(in_x_ ? 0 : columns_of(std::min({most, end - begin, s_.out[2]})) * c + kStep);
    for (int64_t at = begin; at < end;) {
      const int64_t image = at / s_.out[2], x = at % s_.out[2];
      const int64_t count = std::min({most, end - at, s_.out[2] - x}), columns = columns_of(count);
      const int64_t first = x * s_.stride[2] - s_.padding[2];
      if (!in_x_) {
        copy_columns(image, 0, first, columns, copy.get());
        std::memset(copy.get() + columns * c, 0, kStep);
      }
      const uint8_t* const data = in_x_ ? x_ + (image * s_.in[2] + first) * c : copy.get();
      f(EvenRows{data, 1, 0, count, step, 1, 0, steps_, count, count}, at);
      at += count;
    }
  }

  // `lines` lines from y on, of `images` images; of several, all lines.
  EvenRows rows(int64_t image, int64_t images, int64_t y, int64_t lines, uint8_t* copy) const {
    const int64_t bytes = pitch_ * s_.in_channels;
    const int64_t first_row = y * s_.stride[1] - s_.padding[1];
    const uint8_t* const first = in_x_ ? x_ + (image * s_.in[1] + first_row) * bytes : copy;
    if (!in_x_) {
      const int64_t before = s_.padding[2] * s_.in_channels;
      std::memset(copy, zero_point_, before);
      copy += before;
      for (int64_t i = image; i < image + images; ++i) {
        for (int64_t row = first_row; row < first_row + rows_of(lines); ++row, copy += bytes)
          copy_columns(i, row, 0, pitch_, copy);
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

  // Copies the columns [first, first + count) of a line of x, and padding where there are none.
  void copy_columns(int64_t image, int64_t row, int64_t first, int64_t count, uint8_t* to) const {
    const int64_t c = s_.in_channels, in = row < 0 || row >= s_.in[1] ? 0 : s_.in[2];
    const int64_t before = std::clamp<int64_t>(-first, 0, count);
    const int64_t there = std::clamp<int64_t>(in - first - before, 0, count - before);
    std::memset(to, zero_point_, before * c);
    if (there > 0) {
      const int64_t line = (image * s_.in[1] + row) * s_.in[2];
      std::memcpy(to + before * c, x_ + (line + first + before) * c, there * c);
    }
    std::memset(to + (before + there) * c, zero_point_, (count - before - there) * c);
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
