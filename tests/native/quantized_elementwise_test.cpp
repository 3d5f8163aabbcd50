// Compares elementwise operations, pooling, norms and interpolation of quantized tensors, for every instruction
// set, with simple loops or with the scalar kernels. Independent of torch, so that it can run under sanitizers
// and emulators of other processors.
#include <limits>
#include <string>

#include "cpu/quantized/elementwise.h"
#include "cpu/quantized/embedding.h"
#include "cpu/quantized/interpolation.h"
#include "cpu/quantized/normalization.h"
#include "cpu/quantized/pooling.h"
#include "quantized_testing.h"

namespace fastquant {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

Quantization random_quantization(bool is_signed) {
  return {std::ldexp(1.0 + double(rng() % 9), -int(rng() % 6)), random_zero_point(is_signed), is_signed};
}

bool random_sign() { return rng() % 2 == 0; }

int64_t random_size() { return pick({0, 1, 3, 16, 63, 64, 65, between(0, 300), between(0, 5000)}); }

// ----------------------------------------------------------------------------------- floats

float random_float() {
  constexpr float kSpecial[] = {std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::infinity(),
                                -std::numeric_limits<float>::infinity(),
                                3e9f,
                                -3e38f,
                                -0.0f};
  if (rng() % 8 == 0) return kSpecial[rng() % 6];
  return float(int64_t(rng() % 2001) - 1000) * 0.125f;
}

uint8_t quantized(float x, const Quantization& q) {
  const float y = std::fma(x, 1.0f / float(q.scale), float(q.zero_point));
  const double least = q.is_signed ? -128 : 0, most = least + 255;
  return uint8_t(int64_t(std::isnan(y) ? most : std::min(std::max(double(std::nearbyint(y)), least), most)));
}

void floats() {
  const Quantization q = random_quantization(random_sign());
  const int64_t images = between(1, 2), channels = pick({1, 2, 3, 4, 16, 17, 40}),
                pixels = pick({1, 15, 64, 100});
  const int64_t n = images * channels * pixels;
  Buffer<float> x(n), back(n);
  Buffer<uint8_t> flat(n), transposed(n), moved(n);
  for (int64_t i = 0; i < n; ++i) x[i] = random_float();
  quantize(x.data(), Element::f32, n, q, flat.data());
  quantize_transposed(x.data(), Element::f32, images, channels, pixels, q, transposed.data());
  transpose(flat.data(), images, channels, pixels, moved.data());
  dequantize(flat.data(), n, q, Element::f32, back.data());
  bool same = true, turned = true, exact = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t image = i / (channels * pixels), c = i / pixels % channels, p = i % pixels;
    same &= flat[i] == quantized(x[i], q);
    turned &= transposed[(image * pixels + p) * channels + c] == flat[i];
    exact &= back[i] == float(value_of(flat[i], q.is_signed) - q.zero_point) * float(q.scale);
  }
  expect(same, "quantize");
  expect(turned && moved == transposed, "quantize transposed, transpose");
  expect(exact, "dequantize");
}

// ------------------------------------------------------------------------------------ bytes

float steps(uint8_t byte, const Quantization& q, double unit) {
  return float(value_of(byte, q.is_signed) - q.zero_point) * float(q.scale / unit);
}

void two_operands() {
  const bool is_signed = random_sign();
  const Quantization qa = random_quantization(is_signed), qb = random_quantization(random_sign()),
                     qy = random_quantization(is_signed);
  const double low = pick({-1, 0}) == 0 ? 0.0 : -kInf, high = pick({0, 1}) == 0 ? kInf : 3.0;
  // b is as a, or one element for each row, or one row for all.
  const int64_t rows = pick({1, 2, 7}), columns = random_size(), kind = between(0, 2);
  const auto a = random_bytes(rows * columns), b = random_bytes(rows * columns);
  const int64_t sizes[] = {rows, columns}, whole[] = {columns, 1};
  const int64_t of_b[3][2] = {{columns, 1}, {1, 0}, {0, 1}};
  for (Binary op : {Binary::add, Binary::mul}) {
    Buffer<uint8_t> y(rows * columns);
    const auto [left, right] = operands_of(op, qa, qb, qy.scale);
    const bool done = binary(op, 2, sizes, {a.data(), whole}, left, {b.data(), of_b[kind]}, right,
                             {y.data(), whole}, output_of(qy, low, high));
    bool same = done;
    for (int64_t i = 0; i < rows * columns && same; ++i) {
      const uint8_t other = b[i / columns * of_b[kind][0] + i % columns * of_b[kind][1]];
      const int64_t product =
          (value_of(a[i], is_signed) - qa.zero_point) * (value_of(other, qb.is_signed) - qb.zero_point);
      const float value = op == Binary::add ? steps(a[i], qa, qy.scale) + steps(other, qb, qy.scale)
                                            : float(product) * float(qa.scale * qb.scale / qy.scale);
      same = y[i] == level(value, qy.scale, qy.zero_point, low, high, is_signed);
    }
    expect(same, op == Binary::add ? "add" : "mul");
  }
}

// Slices of a matrix, side by side or one above the other.
void concatenated(int64_t most_rows) {
  const bool is_signed = random_sign();
  const Quantization to = random_quantization(is_signed);
  const int64_t axis = between(0, 1), count = between(1, 4);
  int64_t sizes[4][2], strides[4][2], whole[] = {0, 0};
  std::vector<Buffer<uint8_t>> x;
  std::vector<Quantization> q;
  const int64_t others = axis == 1 ? pick({1, 3, most_rows}) : random_size();
  for (int64_t k = 0; k < count; ++k) {
    sizes[k][axis] = axis == 1 ? random_size() : pick({1, 3, most_rows});
    sizes[k][1 - axis] = whole[1 - axis] = others;
    whole[axis] += sizes[k][axis];
    strides[k][0] = sizes[k][1];
    strides[k][1] = 1;
    x.push_back(random_bytes(sizes[k][0] * sizes[k][1]));
    q.push_back(rng() % 3 == 0 ? to : random_quantization(is_signed));
  }
  std::vector<Slice> slices;
  for (int64_t k = 0; k < count; ++k) {
    slices.push_back({sizes[k], {x[k].data(), strides[k]}, operand_of(q[k], to.scale)});
  }
  Buffer<uint8_t> y(whole[0] * whole[1]);
  const int64_t of_y[] = {whole[1], 1};
  bool same = concatenate(2, axis, slices.data(), count, {y.data(), of_y}, output_of(to, -kInf, kInf));
  int64_t before = 0;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < sizes[k][0] * sizes[k][1]; ++i) {
      int64_t at[] = {i / sizes[k][1], i % sizes[k][1]};
      at[axis] += before;
      same &= y[at[0] * whole[1] + at[1]] ==
              level(steps(x[k][i], q[k], to.scale), to.scale, to.zero_point, -kInf, kInf, is_signed);
    }
    before += sizes[k][axis];
  }
  expect(same, "concatenate");
}

void concatenated_slices() { concatenated(50); }

void tables() {
  const int64_t n = random_size();
  const auto x = random_bytes(n), table = random_bytes(256);
  Buffer<uint8_t> y(n);
  look_up(x.data(), n, table.data(), y.data());
  bool same = true;
  for (int64_t i = 0; i < n; ++i) same &= y[i] == table[x[i]];
  expect(same, "look up");
}

// ----------------------------------------------------------------------------------- images

// The result with these kernels, and with the scalar ones.
template <class F>
void expect_as_scalar(int64_t n, const char* what, const F& run) {
  Buffer<uint8_t> y(n), expected(n);
  run(y.data());
  const std::string current = isa();
  set_isa("scalar");
  run(expected.data());
  set_isa(current.c_str());
  expect(y == expected, what);
}

void pools() {
  const bool is_signed = random_sign();
  const int64_t count = between(1, 2), channels = pick({1, 3, 16, 31, 64, 70, 130}), gap = pick({0, 0, 5});
  const int64_t high = between(2, 9), wide = between(2, 9), pixel = channels + gap;
  const auto data = random_bytes(count * high * wide * pixel - gap);
  const Images x = {data.data(), count, channels, high * wide * pixel, {0, wide * pixel, pixel}, is_signed};
  const int64_t kernel = between(1, 2), stride = between(1, 2), padding = between(0, kernel / 2);
  const bool ceil_mode = random_sign(), counted = random_sign();
  const auto along = [&](int64_t size) {
    return sliding_windows(size, kernel, stride, padding, 1, ceil_mode, counted);
  };
  const Windows windows[] = {adaptive_windows(1, 1), along(high), along(wide)};
  const int64_t rows = int64_t(windows[1].begin.size()), columns = int64_t(windows[2].begin.size());
  Buffer<uint8_t> most(count * rows * columns * channels), mean(most.size());
  const int64_t zero_point = random_zero_point(is_signed);
  max_pool(x, windows, most.data());
  average_pool(x, zero_point, windows, std::nullopt, mean.data());
  bool same = true, right = true;
  for (int64_t i = 0; i < most.size(); ++i) {
    const int64_t c = i % channels, w = i / channels % columns, h = i / channels / columns % rows,
                  image = i / channels / columns / rows;
    int64_t largest = is_signed ? -128 : 0, sum = 0;
    for (int64_t row = windows[1].begin[h]; row < windows[1].end[h]; ++row) {
      for (int64_t u = windows[2].begin[w]; u < windows[2].end[w]; ++u) {
        const int64_t value = value_of(data[((image * high + row) * wide + u) * pixel + c], is_signed);
        largest = std::max(largest, value);
        sum += value - zero_point;
      }
    }
    const float average = float(sum) / float(windows[1].divisor[h] * windows[2].divisor[w]);
    same &= most[i] == uint8_t(largest);
    right &= mean[i] == level(average, 1.0, zero_point, -kInf, kInf, is_signed);
  }
  expect(same, "max pool");
  expect(right, "average pool");
  const int64_t n = between(1, 700);
  const auto lines = random_bytes(3 * n);
  expect_as_scalar(3, "mean of rows", [&](uint8_t* y) { mean_of_rows(lines.data(), 3, n, is_signed, y); });
}

void resized() {
  const int64_t channels = pick({1, 3, 31, 64, 70}), high = between(1, 6), wide = between(1, 6);
  const auto data = random_bytes(2 * high * wide * channels);
  const Images x = {data.data(),  2, channels, high * wide * channels, {0, wide * channels, channels},
                    random_sign()};
  Resizing r = {Interpolation(between(0, 2)),      random_sign(), 1, {1, high, wide},
                {1, between(1, 9), between(1, 9)}, {1, 0, 0}};
  for (int k = 1; k < kPoolDims; ++k) r.ratios[k] = double(r.sizes[k]) / double(r.outputs[k]);
  expect_as_scalar(2 * r.outputs[1] * r.outputs[2] * channels, "interpolate",
                   [&](uint8_t* y) { interpolate(x, r, y); });
}

// ------------------------------------------------------------------------------------ norms

void norms() {
  const Quantization q = random_quantization(random_sign());
  const NormOutput output = {random_quantization(q.is_signed), -kInf, kInf};
  const int64_t images = between(1, 3), pixels = between(1, 40), groups = between(1, 3);
  const int64_t channels = groups * pick({1, 5, 16, 31, 64}), n = images * pixels * channels;
  const auto x = random_bytes(n);
  Affine affine;
  if (random_sign()) {
    affine.weight.emplace(channels, 0.7);
    affine.bias.emplace(channels, -1.3);
  }
  const std::vector<double> mean(channels, 0.4), var(channels, 2.0);
  expect_as_scalar(n, "batch norm", [&](uint8_t* y) {
    batch_norm(x.data(), images * pixels, channels, q, affine, mean, var, 1e-5, output, y);
  });
  expect_as_scalar(n, "group norm", [&](uint8_t* y) {
    group_norm(x.data(), images, pixels, channels, groups, q, affine, 1e-5, output, y);
  });
  expect_as_scalar(n, "layer norm", [&](uint8_t* y) {
    layer_norm(x.data(), images * pixels, channels, q, affine, 1e-5, output, y);
  });
  expect_as_scalar(n, "softmax", [&](uint8_t* y) {
    softmax(x.data(), images, pixels, channels, q.scale, q.is_signed, output.quantization, y);
  });
}

// Bags of embeddings beside a loop over their elements; the table ends with its allocation.
void embeddings() {
  const int64_t bits = pick({4, 8}), dim = pick({1, 7, 16, 17, 64, between(1, 200)}), rows = between(1, 20);
  const int64_t row_bytes = embedding_row_bytes(dim, bits), count = between(1, 8), size = between(0, 6);
  const auto table = random_bytes(rows * row_bytes);
  for (int64_t r = 0; r < rows; ++r) {
    const float numbers[] = {float(rng() % 100 + 1) * 0.01f, float(int64_t(rng() % 100)) - 50.0f};
    std::memcpy(table.data() + (r + 1) * row_bytes - 8, numbers, sizeof numbers);
  }
  Buffer<int64_t> indices(count * size);
  for (int64_t i = 0; i < indices.size(); ++i) indices[i] = between(0, rows - 1);
  const auto element = [&](int64_t row, int64_t i) {
    const uint8_t* const from = table.data() + row * row_bytes;
    float numbers[2];
    std::memcpy(numbers, from + row_bytes - 8, sizeof numbers);
    const int value = bits == 8 ? from[i] : (from[i / 2] >> (4 * (i % 2))) & 15;
    return std::fma(float(value), numbers[0], numbers[1] * numbers[0]);
  };
  const Integers1d given = {indices.data(), Element::i64, indices.size()}, none = {nullptr, Element::i64, 0};
  const EmbeddingTable embeddings_of = {table.data(), rows, dim, bits};
  Buffer<float> each(indices.size() * dim), sums(count * dim), most(count * dim);
  embedding(embeddings_of, given, each.data());
  const Bags bags = {none, count, size, false, nullptr, none, BagMode::sum, std::nullopt};
  embedding_bag(embeddings_of, given, bags, sums.data());
  Bags of_most = bags;
  of_most.mode = BagMode::max;
  embedding_bag(embeddings_of, given, of_most, most.data());
  bool same = true;
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t b = 0; b < count; ++b) {
      float sum = 0.0f, largest = size == 0 ? 0.0f : -std::numeric_limits<float>::infinity();
      for (int64_t k = b * size; k < (b + 1) * size; ++k) {
        const float x = element(indices[k], i);
        same &= each[k * dim + i] == x;
        sum += x;
        largest = std::max(largest, x);
      }
      same &= sums[b * dim + i] == sum && most[b * dim + i] == largest;
    }
  }
  expect(same, "embeddings");
}

void everything() {
  for (int i = 0; i < 150; ++i) {
    for (auto test : {floats, two_operands, concatenated_slices, tables, pools, resized, norms, embeddings})
      test();
  }
  // Enough for several threads, and for several blocks of rows.
  for (int i = 0; i < 6; ++i) concatenated(3000);
  const int64_t n = 300'001;
  const auto x = random_bytes(n), table = random_bytes(256);
  expect_as_scalar(n, "look up, large", [&](uint8_t* y) { look_up(x.data(), n, table.data(), y); });
}

}  // namespace
}  // namespace fastquant

int main() { return fastquant::run_everywhere(fastquant::everything); }
