// Norms and softmax of quantized tensors, on plain memory and in parallel.
#pragma once

#include <optional>
#include <vector>

#include "elementwise.h"

namespace fastquant {

// What an affine transformation has for each channel or element; nothing stands for 1 and 0.
struct Affine {
  std::optional<std::vector<double>> weight, bias;
};

struct NormOutput {
  Quantization quantization;
  double low, high;  // in real units
};

// x and the output are [rows, channels]. mean and var are those of each channel.
void batch_norm(const uint8_t* x, int64_t rows, int64_t channels, const Quantization& of_x,
                const Affine& affine, const std::vector<double>& mean, const std::vector<double>& var,
                double eps, const NormOutput& output, uint8_t* out);

// x and the output are [images, pixels, channels]; statistics are of each image, for the channels of a group.
void group_norm(const uint8_t* x, int64_t images, int64_t pixels, int64_t channels, int64_t groups,
                const Quantization& of_x, const Affine& affine, double eps, const NormOutput& output,
                uint8_t* out);

// x and the output are [rows, n]; statistics are of each row, and the affine transformation of each of n.
void layer_norm(const uint8_t* x, int64_t rows, int64_t n, const Quantization& of_x, const Affine& affine,
                double eps, const NormOutput& output, uint8_t* out);

// x and the output are [outer, n, inner]; the outputs for the n elements add up to 1.
void softmax(const uint8_t* x, int64_t outer, int64_t n, int64_t inner, double x_scale, bool is_signed,
             const Quantization& output, uint8_t* out);

}  // namespace fastquant
