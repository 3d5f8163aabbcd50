// The bodies of the pooling kernels. Everything here is in an anonymous namespace, and std:: is not used: see
// ../../kernels-inl.h.
#pragma once

#include "../bytes_scalar.h"
#include "../pooling_kernels.h"
#include "sums-inl.h"
#include "vectors-inl.h"

namespace fastquant {
namespace {

// Calls f(p) for each pixel of the window of output i, of which p is the first channel.
template <class F>
void for_window(const PoolRow& row, int64_t i, const F& f) {
  const int64_t begin = row.begin[i], end = row.end[i];
  for (int64_t r = 0; r < row.row_count; ++r) {
    // Pixels are counted, not bytes: those of an expanded tensor are 0 bytes apart.
    const uint8_t* p = row.rows[r] + begin * row.pixel_stride;
    for (int64_t u = begin; u < end; u += row.step, p += row.step * row.pixel_stride) f(p);
  }
}

template <class B>
void max_pool(const PoolRow& row) {
  const auto flip = B::set1(row.flip);
  for (int64_t i = 0; i < row.count; ++i) {
    for_vectors<B>(row.channels, [&](int64_t c, const auto& load, const auto& store) {
      auto most = B::set1(0);
      for_window(row, i, [&](const uint8_t* p) { most = B::max(most, B::flip(load(p + c), flip)); });
      store(row.out + i * row.channels + c, B::flip(most, flip));
    });
  }
}

// The average of each window of a column of outputs, of the sums of its elements.
template <class B>
class Average {
 public:
  using F = typename B::Floats;

  Average(int64_t taps, int zero_point, int64_t divisor)
      : zero_point_(B::words1(zero_point)),
        excess_(B::ints1(static_cast<int32_t>(taps * zero_point))),
        minus_divisor_(F::set1(-static_cast<float>(divisor))),
        reciprocal_(F::set1(1.0f / static_cast<float>(divisor))) {}

  typename B::Reg of(const typename B::Ints* sums) const {
    typename F::Reg y[B::kParts];
    for (int k = 0; k < B::kParts; ++k) y[k] = quotient(B::to_float(B::sub(sums[k], excess_)));
    return B::narrow(y, zero_point_);
  }

 private:
  // A division would take longer than all the rest. The product with the reciprocal is corrected by what
  // remains, which makes quotients exact that fp32 can hold, halves among them: these are rounded to even.
  typename F::Reg quotient(typename F::Reg x) const {
    const auto y = F::mul(x, reciprocal_);
    return F::madd(F::madd(y, minus_divisor_, x), reciprocal_, y);
  }

  typename B::Words zero_point_;
  typename B::Ints excess_;
  typename F::Reg minus_divisor_, reciprocal_;
};

// Columns of pixels whose sums are kept: a power of two, and at least as many as a window has.
constexpr int64_t kMostColumns = 8;

// Whether windows share columns, which are few enough to be kept, and whose sums fit in 16 bits.
static inline bool shares_columns(const PoolRow& row) {
  if (row.step != 1 || row.count < 2 || row.begin[1] >= row.end[0]) return false;
  for (int64_t i = 0; i < row.count; ++i) {
    if (row.end[i] - row.begin[i] > kMostColumns) return false;
  }
  return row.row_count * kMostColumns <= 257;
}

// Each column of pixels is added up once, for all windows that it belongs to.
template <class B>
void average_of_columns(const PoolRow& row, int zero_point, int64_t rows_divisor, const int64_t* divisor) {
  const auto flip = B::set1(row.flip);
  for_vectors<B>(row.channels, [&](int64_t c, const auto& load, const auto& store) {
    typename B::Words columns[kMostColumns][B::kHalves];
    int64_t next = row.begin[0];
    for (int64_t i = 0; i < row.count; ++i) {
      const int64_t begin = row.begin[i], end = row.end[i];
      for (next = next < begin ? begin : next; next < end; ++next) {
        typename B::Words column[B::kHalves];
        for (auto& words : column) words = B::words1(0);
        const int64_t at = next * row.pixel_stride + c;
        for (int64_t r = 0; r < row.row_count; ++r) B::add_bytes(B::flip(load(row.rows[r] + at), flip), column);
        for (int h = 0; h < B::kHalves; ++h) columns[next % kMostColumns][h] = column[h];
      }
      typename B::Words total[B::kHalves];
      for (auto& words : total) words = B::words1(0);
      for (int64_t u = begin; u < end; ++u) {
        for (int h = 0; h < B::kHalves; ++h) total[h] = B::add(total[h], columns[u % kMostColumns][h]);
      }
      typename B::Ints sums[B::kParts];
      for (auto& ints : sums) ints = B::ints1(0);
      B::add_words(total, sums);
      const int64_t taps = end <= begin ? 0 : row.row_count * (end - begin);
      const Average<B> average(taps, zero_point, rows_divisor * divisor[i]);
      store(row.out + i * row.channels + c, B::flip(average.of(sums), flip));
    }
  });
}

template <class B>
void average_pool(const PoolRow& row, int zero_point, int64_t rows_divisor, const int64_t* divisor) {
  if (shares_columns(row)) return average_of_columns<B>(row, zero_point, rows_divisor, divisor);
  const auto flip = B::set1(row.flip);
  for (int64_t i = 0; i < row.count; ++i) {
    const int64_t width = row.end[i] - row.begin[i];
    const int64_t taps = width <= 0 ? 0 : row.row_count * ((width + row.step - 1) / row.step);
    const Average<B> average(taps, zero_point, rows_divisor * divisor[i]);
    for_vectors<B>(row.channels, [&](int64_t c, const auto& load, const auto& store) {
      Sums<B> sums;
      for_window(row, i, [&](const uint8_t* p) { sums.add(B::flip(load(p + c), flip)); });
      store(row.out + i * row.channels + c, B::flip(average.of(sums.sums()), flip));
    });
  }
}

template <class B>
void interpolate(const InterpolatedRow& row) {
  using F = typename B::Floats;
  const auto flip = B::set1(row.flip);
  // Of int8, the values themselves are mixed, not the bytes.
  const auto zero = B::center_of(row.flip);
  const auto shift = B::words1(row.flip);
  for (int64_t i = 0; i < row.count; ++i) {
    const int64_t left = row.left[i] * row.pixel_stride, right = row.right[i] * row.pixel_stride;
    const auto of_left = F::set1(row.left_weights[i]), of_right = F::set1(row.right_weights[i]);
    for_vectors<B>(row.channels, [&](int64_t c, const auto& load, const auto& store) {
      const auto mix = [&](int64_t r, typename F::Reg* y) {
        typename F::Reg a[B::kParts], b[B::kParts];
        B::widen(B::flip(load(row.rows[r] + left + c), flip), zero, a);
        B::widen(B::flip(load(row.rows[r] + right + c), flip), zero, b);
        const auto weight = F::set1(row.row_weights[r]);
        for (int k = 0; k < B::kParts; ++k) {
          y[k] = F::mul(F::add(F::mul(a[k], of_left), F::mul(b[k], of_right)), weight);
        }
      };
      typename F::Reg total[B::kParts], more[B::kParts];
      mix(0, total);
      for (int64_t r = 1; r < row.row_count; ++r) {
        mix(r, more);
        for (int k = 0; k < B::kParts; ++k) total[k] = F::add(total[k], more[k]);
      }
      store(row.out + i * row.channels + c, B::flip(B::narrow(total, shift), flip));
    });
  }
}

template <class B>
int64_t sum(const uint8_t* x, int64_t n, uint8_t flip) {
  constexpr int64_t kBlock = int64_t{1} << 22;  // whose sums fit in int32
  const auto flips = B::set1(flip);
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    Sums<B> sums;
    int64_t i = 0;
    for (; i + B::N <= count; i += B::N) sums.add(B::flip(B::load(x + begin + i), flips));
    const auto* const parts = sums.sums();
    for (int k = 0; k < B::kParts; ++k) {
      int32_t values[B::Floats::N];
      B::store_ints(values, parts[k]);
      for (int32_t value : values) total += value;
    }
    for (; i < count; ++i) total += x[begin + i] ^ flip;
  }
  return total;
}

template <class B>
void mean_of_rows(const uint8_t* x, uint8_t* out, int64_t rows, int64_t n, uint8_t flip) {
  for (int64_t r = 0; r < rows; ++r) {
    const float mean = static_cast<float>(sum<B>(x + r * n, n, flip)) / static_cast<float>(n);
    out[r] = ScalarBytes::flip(ScalarBytes::narrow(&mean, 0), flip);
  }
}

template <class B>
constexpr PoolingKernels pooling_table() {
  static_assert(has_bytes_interface<B>(), "see bytes.h");
  return {max_pool<B>, average_pool<B>, interpolate<B>, mean_of_rows<B>};
}

}  // namespace
}  // namespace fastquant
