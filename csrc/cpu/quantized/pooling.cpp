#include "pooling.h"

#include "../arrays.h"
#include "kernels.h"
#include "pooling_kernels.h"
#include "quantization.h"

namespace fastquant {
namespace {

const PoolingKernels& table() { return *quantized_kernels().pooling; }

int64_t outputs_of(const Windows& w) { return static_cast<int64_t>(w.begin.size()); }

int64_t pixels_in(const Windows& w, int64_t i) {
  return w.end[i] <= w.begin[i] ? 0 : (w.end[i] - w.begin[i] + w.step - 1) / w.step;
}

int64_t most_pixels(const Windows& w) {
  int64_t most = 0;
  for (int64_t i = 0; i < outputs_of(w); ++i) most = std::max(most, pixels_in(w, i));
  return most;
}

// Calls f(row, divisor) for each row of outputs, in parallel; divisor is that of the row's windows in the other
// dimensions.
template <class F>
void for_rows(const Images& x, const Windows (&windows)[kPoolDims], uint8_t* out, const F& f) {
  const Windows &depth = windows[0], &height = windows[1], &width = windows[2];
  const int64_t deep = outputs_of(depth), high = outputs_of(height), wide = outputs_of(width);
  const int64_t all = x.count * deep * high, bytes = wide * x.channels;
  if (all * bytes == 0) return;
  const int64_t most_rows = most_pixels(depth) * most_pixels(height);
  const int64_t taps = most_rows * most_pixels(width);
  check(taps <= kMostOfWindow, "a window must have at most ", kMostOfWindow, " elements");
  // A tap takes a fraction of the time that writing an element does elsewhere.
  const int64_t pieces = std::min(piece_count(all * bytes * (1 + taps / 4)), all);
  for_pieces(all, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<const uint8_t*> rows(most_rows);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t h = at % high, d = at / high % deep;
      const uint8_t* const image = x.data + at / high / deep * x.image_stride;
      int64_t count = 0;
      for (int64_t z = depth.begin[d]; z < depth.end[d]; z += depth.step) {
        for (int64_t y = height.begin[h]; y < height.end[h]; y += height.step) {
          rows[count++] = image + z * x.strides[0] + y * x.strides[1];
        }
      }
      const PoolRow row = {
          rows.data(),      count, width.begin.data(),  width.end.data(), width.step, x.strides[2], x.channels,
          out + at * bytes, wide,  flip_of(x.is_signed)};
      f(row, depth.divisor[d] * height.divisor[h]);
    }
  });
}

}  // namespace

Windows sliding_windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                        bool ceil_mode, bool count_padding) {
  check(kernel > 0 && stride > 0 && dilation > 0 && padding >= 0, "kernel_size, stride and dilation must be ",
        "positive, padding must not be negative");
  const int64_t span = dilation * (kernel - 1) + 1;
  check(padding <= span / 2, "padding must be at most half of the window, got ", padding, " for ", span);
  const int64_t room = size + 2 * padding - span;
  check(room >= 0, "the window is larger than the padded input");
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // The last window begins inside the input or before it.
  if (ceil_mode && (count - 1) * stride >= size + padding) --count;
  Windows w;
  w.reserve(count);
  w.step = dilation;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = i * stride - padding, to = from + span;
    const int64_t skipped = from < 0 ? (-from + dilation - 1) / dilation : 0;
    w.begin.push_back(from + skipped * dilation);
    w.end.push_back(std::min(to, size));
    const int64_t counted = count_padding ? std::min(to, size + padding) - from : pixels_in(w, i);
    w.divisor.push_back(counted);
  }
  return w;
}

Windows adaptive_windows(int64_t size, int64_t outputs) {
  Windows w;
  w.reserve(outputs);
  w.step = 1;
  for (int64_t i = 0; i < outputs; ++i) {
    w.begin.push_back(i * size / outputs);
    w.end.push_back(((i + 1) * size + outputs - 1) / outputs);
    w.divisor.push_back(w.end[i] - w.begin[i]);
  }
  return w;
}

void max_pool(const Images& x, const Windows (&windows)[kPoolDims], uint8_t* out) {
  for_rows(x, windows, out, [&](const PoolRow& row, int64_t) { table().max(row); });
}

void average_pool(const Images& x, int64_t zero_point, const Windows (&windows)[kPoolDims],
                  std::optional<int64_t> divisor, uint8_t* out) {
  const Windows& width = windows[kPoolDims - 1];
  const std::vector<int64_t> ones(divisor.has_value() ? width.divisor.size() : 0, 1);
  const int64_t* const divisors = divisor.has_value() ? ones.data() : width.divisor.data();
  const int of_bytes = zero_point_of_bytes(zero_point, x.is_signed);
  for_rows(x, windows, out, [&](const PoolRow& row, int64_t of_rows) {
    table().average(row, of_bytes, divisor.value_or(of_rows), divisors);
  });
}

void mean_of_rows(const uint8_t* x, int64_t rows, int64_t n, bool is_signed, uint8_t* out) {
  const int64_t pieces = std::min(piece_count(rows * n, 4 * kGrain), rows);
  for_pieces(rows, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    table().mean_of_rows(x + begin * n, out + begin, end - begin, n, flip_of(is_signed));
  });
}

}  // namespace fastquant
