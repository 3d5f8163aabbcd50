// How the elements of a tensor's channels are cut into chunks for kernels of batch norm. Size and order of the
// chunks depend on the shape alone.
#pragma once

#include "../math/range.h"
#include "arrays.h"
#include "extremes.h"

namespace fastquant {
namespace {

// Whether the channels are the columns of a matrix.
inline bool has_columns(const Dense& d) { return d.inner == 1 && d.channels > 1; }

// A chunk of a tensor with rows: its number, its channel, and where it begins.
struct RowChunk {
  int64_t index, channel, begin;
  ChannelChunk shape;
};

// The chunks of a tensor with rows: a row or a part of it, or several short rows of a channel. They are
// numbered, and worked on, in the order of memory, as far as hardware fetches memory ahead in that order.
class RowChunks {
 public:
  explicit RowChunks(const Dense& d) : d_(d) {
    if (d.inner < kShortRow) {
      rows_ = std::max<int64_t>(std::min(d.outer, kMostGathered / std::max<int64_t>(d.inner, 1)), 1);
      length_ = d.inner;
    } else {
      constexpr int64_t kUnit = 64;  // a multiple of what kernels take at once
      const int64_t parts = (d.inner + kLongestChunk - 1) / kLongestChunk;
      length_ = ((d.inner + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
      parts_ = (d.inner + length_ - 1) / length_;
    }
    per_channel_ = (d.outer + rows_ - 1) / rows_ * parts_;
  }

  int64_t count() const { return per_channel_ * d_.channels; }

  // Calls f for all chunks, of elements of S.
  template <class S, class F>
  void each(const F& f) const {
    of_channels<S>({0, d_.channels}, f);
  }

  // The same in parallel.
  template <class S, class F>
  void in_parallel(int64_t pieces, const F& f) const {
    for_pieces(count(), std::min(pieces, count()), 1,
               [&](int64_t, int64_t first, int64_t end) { each<S>({0, d_.channels}, first, end, f); });
  }

  // The same for some channels.
  template <class S, class F>
  void of_channels(const Range<int64_t>& channels, const F& f) const {
    each<S>(channels, 0, per_channel_ * (channels.high - channels.low), f);
  }

 private:
  // The chunks of a row of all channels lie one after another: where they are short, one further on is fetched.
  static constexpr int64_t kLeastAhead = 4096;

  struct Place {
    int64_t row, channel, column;
  };

  // Calls f for the chunks [first, end) of the channels [low, high).
  template <class S, class F>
  void each(const Range<int64_t>& channels, int64_t first, int64_t end, const F& f) const {
    const int64_t width = channels.high - channels.low, k = first / parts_;
    Place here = {k / width * rows_, channels.low + k % width, first % parts_ * length_};
    for (int64_t i = first; i < end; ++i) {
      const Place next = after(here, channels);
      const int64_t begin = begin_of(here);
      int64_t ahead = (begin_of(next) - begin) * static_cast<int64_t>(sizeof(S));
      if (next.row == here.row) ahead = std::max(ahead, kLeastAhead);
      f({i, here.channel, begin,
         ChannelChunk{std::min(rows_, d_.outer - here.row), std::min(length_, d_.inner - here.column),
                      d_.channels * d_.inner, ahead}});
      here = next;
    }
  }

  Place after(const Place& p, const Range<int64_t>& channels) const {
    if (p.column + length_ < d_.inner) return {p.row, p.channel, p.column + length_};
    if (p.channel + 1 < channels.high) return {p.row, p.channel + 1, 0};
    if (p.row + rows_ < d_.outer) return {p.row + rows_, channels.low, 0};
    return {0, std::min(channels.high, d_.channels - 1), 0};  // what is probably worked on next
  }

  int64_t begin_of(const Place& p) const { return (p.row * d_.channels + p.channel) * d_.inner + p.column; }

  Dense d_;
  int64_t rows_ = 1, length_ = 1, parts_ = 1, per_channel_ = 1;
};

// The chunks of a matrix with a column per channel: blocks of rows. Where channels are few, several rows count
// as one wide row, whose columns fill vectors: a channel then has several columns, and the rows that are left
// at the end are a chunk of their own, as narrow as they are.
class ColumnChunks {
 public:
  explicit ColumnChunks(const Dense& d)
      : channels_(d.channels),
        times_(rows_as_one(d.channels)),
        rows_(d.outer / times_),
        rest_(d.outer % times_),
        block_(std::max<int64_t>(kElements / width() / kUnit, 1) * kUnit),
        wide_((rows_ + block_ - 1) / block_) {}

  int64_t width() const { return channels_ * times_; }
  int64_t count() const { return wide_ + (rest_ > 0); }

  // Of a chunk: the first element, rows, and columns. Column c belongs to channel c % channels.
  int64_t begin(int64_t i) const { return std::min(i * block_, rows_) * width(); }
  int64_t rows(int64_t i) const { return i < wide_ ? std::min(block_, rows_ - i * block_) : rest_; }
  int64_t columns(int64_t i) const { return i < wide_ ? width() : channels_; }

  // Calls f for all chunks in parallel.
  template <class F>
  void in_parallel(int64_t pieces, const F& f) const {
    for_pieces(count(), std::min(pieces, count()), 1, [&](int64_t, int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) f(i);
    });
  }

  // Calls f(i, c, channel) for the columns c of all chunks, those of a channel always in the same order.
  template <class F>
  void each_column(const F& f) const {
    for (int64_t i = 0; i < count(); ++i) {
      for (int64_t c = 0; c < columns(i); ++c) f(i, c, c % channels_);
    }
  }

 private:
  static constexpr int64_t kElements = 65536, kUnit = 32;

  static int64_t rows_as_one(int64_t channels) {
    constexpr int64_t kFew = 32, kWide = 128;
    int64_t times = 1;
    while (channels < kFew && channels * times % kFew != 0 && channels * times < kWide) times *= 2;
    return times;
  }

  int64_t channels_, times_, rows_, rest_, block_, wide_;
};

}  // namespace
}  // namespace fastquant
