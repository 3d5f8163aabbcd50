#include "normalization.h"

#include "../arrays.h"
#include "bytes_scalar.h"
#include "kernels.h"
#include "norm_kernels.h"

namespace fastquant {
namespace {

const NormKernels& table() { return *quantized_kernels().norm; }

// The sums of squares of this many bytes, times their number, fit in int64.
constexpr int64_t kMostElements = int64_t{1} << 23;

double weight_of(const Affine& affine, int64_t i) {
  return affine.weight.has_value() ? (*affine.weight)[i] : 1.0;
}
double bias_of(const Affine& affine, int64_t i) { return affine.bias.has_value() ? (*affine.bias)[i] : 0.0; }

// The mean of integers, and one over their standard deviation in real units.
struct Statistics {
  double mean, inverse_deviation;
};

// Of n bytes with these sums.
Statistics statistics_of(int64_t n, int64_t sum, int64_t squares, double scale, double eps) {
  check(n <= kMostElements, "a norm must be of at most ", kMostElements, " elements");
  const double count = static_cast<double>(n);
  const double variance = static_cast<double>(n * squares - sum * sum) / (count * count);
  return {static_cast<double>(sum) / count, 1.0 / std::sqrt(variance * (scale * scale) + eps)};
}

// gain and bias of each channel, in steps of the output.
struct Channels {
  explicit Channels(int64_t count) : gain(count), bias(count) {}

  void set(int64_t c, double slope, double mean, double shift, double x_scale, double unit) {
    gain[c] = static_cast<float>(slope * x_scale / unit);
    bias[c] = static_cast<float>((shift - mean * slope) / unit);
  }

  std::vector<float> gain, bias;
};

void normalize_pixels(const uint8_t* x, uint8_t* out, int64_t rows, int64_t columns, const Quantization& of_x,
                      const Channels& channels, const NormOutput& output) {
  const Operand operand = operand_of(of_x, 1.0);
  const Output to = output_of(output.quantization, output.low, output.high);
  for_pieces(rows, std::min(piece_count(rows * columns), rows), 1, [&](int64_t, int64_t begin, int64_t end) {
    if (begin >= end) return;
    table().normalize({x + begin * columns, columns}, {out + begin * columns, columns}, end - begin, columns,
                      operand, 0.0f, 1.0f, channels.gain.data(), channels.bias.data(), to);
  });
}

}  // namespace

void batch_norm(const uint8_t* x, int64_t rows, int64_t channels, const Quantization& of_x,
                const Affine& affine, const std::vector<double>& mean, const std::vector<double>& var,
                double eps, const NormOutput& output, uint8_t* out) {
  Channels arrays(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double slope = weight_of(affine, c) / std::sqrt(var[c] + eps);
    arrays.set(c, slope, mean[c], bias_of(affine, c), of_x.scale, output.quantization.scale);
  }
  normalize_pixels(x, out, rows, channels, of_x, arrays, output);
}

void group_norm(const uint8_t* x, int64_t images, int64_t pixels, int64_t channels, int64_t groups,
                const Quantization& of_x, const Affine& affine, double eps, const NormOutput& output,
                uint8_t* out) {
  const int64_t each = channels / groups, size = pixels * channels;
  const double zero_point = zero_point_of_bytes(of_x.zero_point, of_x.is_signed);
  const uint8_t flip = flip_of(of_x.is_signed);
  const auto of_image = [&](int64_t image) {
    const uint8_t* const from = x + image * size;
    const int64_t pieces = std::min(piece_count(size), pixels);
    // Sums and sums of squares of all channels, for each piece of the image.
    std::vector<int64_t> parts(2 * channels * pieces);
    for_pieces(pixels, pieces, 1, [&](int64_t piece, int64_t begin, int64_t end) {
      int64_t* const sums = parts.data() + 2 * channels * piece;
      if (begin >= end) return;
      table().moments_of_columns({from + begin * channels, channels}, end - begin, channels, flip, sums,
                                 sums + channels);
    });
    Channels arrays(channels);
    for (int64_t g = 0; g < groups; ++g) {
      int64_t sum = 0, squares = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t* const sums = parts.data() + 2 * channels * piece;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
          sum += sums[c];
          squares += sums[channels + c];
        }
      }
      const Statistics s = statistics_of(pixels * each, sum, squares, of_x.scale, eps);
      for (int64_t c = g * each; c < (g + 1) * each; ++c) {
        arrays.set(c, weight_of(affine, c) * s.inverse_deviation, (s.mean - zero_point) * of_x.scale,
                   bias_of(affine, c), of_x.scale, output.quantization.scale);
      }
    }
    normalize_pixels(from, out + image * size, pixels, channels, of_x, arrays, output);
  };
  // Threads share out the images, or the pixels of each.
  const int64_t pieces = images < thread_count() ? 1 : std::min(piece_count(images * size), images);
  for_pieces(images, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) of_image(image);
  });
}

void layer_norm(const uint8_t* x, int64_t rows, int64_t n, const Quantization& of_x, const Affine& affine,
                double eps, const NormOutput& output, uint8_t* out) {
  const double unit = output.quantization.scale;
  const double zero_point = zero_point_of_bytes(of_x.zero_point, of_x.is_signed);
  const Operand operand = operand_of(of_x, 1.0);
  const Output to = output_of(output.quantization, output.low, output.high);
  Channels arrays(n);
  for (int64_t i = 0; i < n; ++i) {
    arrays.gain[i] = static_cast<float>(weight_of(affine, i));
    arrays.bias[i] = static_cast<float>(bias_of(affine, i) / unit);
  }
  for_pieces(rows, std::min(piece_count(rows * n), rows), 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* const from = x + r * n;
      int64_t sum, squares;
      table().moments(from, n, flip_of(of_x.is_signed), &sum, &squares);
      const Statistics s = statistics_of(n, sum, squares, of_x.scale, eps);
      table().normalize({from, n}, {out + r * n, n}, 1, n, operand, static_cast<float>(s.mean - zero_point),
                        static_cast<float>(s.inverse_deviation * of_x.scale / unit), arrays.gain.data(),
                        arrays.bias.data(), to);
    }
  });
}

void softmax(const uint8_t* x, int64_t outer, int64_t n, int64_t inner, double x_scale, bool is_signed,
             const Quantization& output, uint8_t* out) {
  // The exponentials are whole numbers, so that their sum does not depend on the order.
  constexpr double kOne = 1 << 30;
  int64_t exponentials[256];
  for (int d = 0; d < 256; ++d) {
    exponentials[d] = static_cast<int64_t>(std::nearbyint(std::exp(-static_cast<double>(d) * x_scale) * kOne));
  }
  const Output to = output_of(output, -INFINITY, INFINITY);
  const uint8_t flip = flip_of(is_signed);
  const int64_t lines = outer * inner;
  for_pieces(lines, std::min(piece_count(4 * lines * n), lines), 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t first = line / inner * n * inner + line % inner;
      const auto value = [&](int64_t i) { return x[first + i * inner] ^ flip; };
      int most = 0;
      for (int64_t i = 0; i < n; ++i) most = std::max(most, value(i));
      int64_t sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += exponentials[most - value(i)];
      const float factor = static_cast<float>(1.0 / (static_cast<double>(sum) * output.scale));
      for (int64_t i = 0; i < n; ++i) {
        const float steps = static_cast<float>(exponentials[most - value(i)]) * factor;
        out[first + i * inner] = ScalarBytes::flip(ScalarBytes::narrow(&steps, to.zero_point), to.flip);
      }
    }
  });
}

}  // namespace fastquant
