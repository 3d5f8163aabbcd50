// Checks that every kernel table that this processor supports gives exactly the results of the scalar table,
// for sizes from zero to several vectors, different alignments, and special values. Independent of torch and
// Python, so that it can run under sanitizers, and under emulators of other processors.
//
// Buffers have exactly the size that is needed, so that AddressSanitizer finds any access beyond them.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/quant_params.h"
#include "cpu/vec_scalar.h"

namespace fastquant {
namespace {

std::mt19937_64 rng(20240229);
int64_t compared = 0;
int64_t failed = 0;

void report(const char* isa, const char* kernel, int64_t n, int64_t offset) {
  if (++failed <= 20)
    std::printf("%s: %s differs from scalar at n = %ld, offset %ld\n", isa, kernel, long(n), long(offset));
}

template <class X>
bool same_bits(const X* a, const X* b, int64_t n) {
  return n == 0 || std::memcmp(a, b, sizeof(X) * static_cast<size_t>(n)) == 0;
}

// Elements that begin at an offset into an allocation, which ends after the last of them.
template <class X>
class Buffer {
 public:
  Buffer(int64_t n, int64_t offset)
      : data_(new X[static_cast<size_t>(n + offset)]()), offset_(offset), size_(n) {}
  X* get() { return data_.get() + offset_; }
  const X* get() const { return data_.get() + offset_; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<X[]> data_;
  int64_t offset_, size_;
};

double random_number(bool hostile) {
  std::normal_distribution<double> normal;
  if (!hostile || rng() % 4 != 0) return normal(rng);
  switch (rng() % 8) {
    case 0:
      return std::numeric_limits<double>::quiet_NaN();
    case 1:
      return std::numeric_limits<double>::infinity();
    case 2:
      return -std::numeric_limits<double>::infinity();
    case 3:
      return 3e38;
    case 4:
      return -3e38;
    case 5:
      return 1e-45;
    case 6:
      return -0.0;
    default:
      return 0.5;  // a tie
  }
}

template <class S>
Buffer<S> random_buffer(int64_t n, int64_t offset, bool hostile) {
  Buffer<S> b(n, offset);
  for (int64_t i = 0; i < n; ++i) from_compute(b.get() + i, static_cast<Compute<S>>(random_number(hostile)));
  return b;
}

// NaN equals NaN here, and 0 equals -0, because a zero's sign depends on the order in which lanes are combined.
template <class T>
bool same_number(T a, T b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

template <class S, class T>
void compare_minmax(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                    int64_t offset, bool hostile) {
  const auto x = random_buffer<S>(n, offset, hostile);
  T low[2], high[2];
  bool nonfinite[2];
  k.minmax(x.get(), n, &low[0], &high[0], &nonfinite[0]);
  ref.minmax(x.get(), n, &low[1], &high[1], &nonfinite[1]);
  ++compared;
  if (!same_number(low[0], low[1]) || !same_number(high[0], high[1]) || nonfinite[0] != nonfinite[1])
    report(isa, "minmax", n, offset);
  bool truth = false;
  for (int64_t i = 0; i < n; ++i) truth |= !std::isfinite(to_compute(x.get()[i]));
  if (nonfinite[0] != truth) report(isa, "minmax nonfinite", n, offset);

  int64_t count[2];
  k.minmax_finite(x.get(), n, &low[0], &high[0], &count[0]);
  ref.minmax_finite(x.get(), n, &low[1], &high[1], &count[1]);
  if (low[0] != low[1] || high[0] != high[1] || count[0] != count[1]) report(isa, "minmax_finite", n, offset);

  const int64_t columns = 1 + static_cast<int64_t>(rng() % 70);
  const int64_t stride = columns + static_cast<int64_t>(rng() % 3);
  const int64_t rows = n < columns ? 0 : (n - columns) / stride + 1;
  std::vector<T> lows[2], highs[2];
  for (int t = 0; t < 2; ++t) {
    lows[t].assign(columns, std::numeric_limits<T>::infinity());
    highs[t].assign(columns, -std::numeric_limits<T>::infinity());
    (t == 0 ? k : ref)
        .minmax_columns(x.get(), rows, columns, stride, lows[t].data(), highs[t].data(), &nonfinite[t]);
  }
  if (lows[0] != lows[1] || highs[0] != highs[1] || nonfinite[0] != nonfinite[1])
    report(isa, "minmax_columns", n, offset);
}

template <class S, class T>
void compare_histogram(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                       int64_t offset, bool hostile) {
  constexpr T kRanges[][2] = {{T(-1.5), T(2)}, {T(0), T(2)}, {T(0.25), T(2)}, {T(-2), T(-0.25)}};
  const T* const range = kRanges[rng() % 4];
  const T low = range[0], high = range[1];
  auto x = random_buffer<S>(n, offset, hostile);
  // Long runs of zeros, as after ReLU, where a channel may have many or few of them.
  const T frequent = std::min(std::max(T(0), low), high);
  for (int64_t i = 0, share = 0; i < n; ++i) {
    if (i % 3000 == 0) share = static_cast<int64_t>(rng() % 5);
    if (static_cast<int64_t>(rng() % 4) < share) from_compute(x.get() + i, frequent);
  }
  const int64_t bins = 1 + static_cast<int64_t>(rng() % 300);
  const int64_t stride = histogram_stride(bins);
  std::vector<int64_t> counts[2];
  for (int t = 0; t < 2; ++t) {
    const int tables = t == 0 ? 4 : 1;
    std::vector<uint32_t> scratch(static_cast<size_t>(stride * tables), 0);
    (t == 0 ? k : ref).histogram(x.get(), n, low, high, bins, scratch.data(), tables);
    counts[t].assign(bins + 1, 0);
    for (int64_t i = 0; i < tables * stride; ++i) {
      if (i % stride <= bins) counts[t][i % stride] += scratch[i];
    }
  }
  ++compared;
  if (counts[0] != counts[1]) report(isa, "histogram", n, offset);
  std::vector<int64_t> truth(bins + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const T e = static_cast<T>(to_compute(x.get()[i]));
    const bool inside = e >= low && e <= high;
    const int64_t bin = inside ? static_cast<int64_t>((e - low) * static_cast<T>(bins) / (high - low)) : bins;
    ++truth[inside ? std::min(bin, bins - 1) : bins];
  }
  if (counts[0] != truth) report(isa, "histogram beside its formula", n, offset);
}

template <class S, class T>
void compare_parts_before(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t bins = 2 + static_cast<int64_t>(rng() % 300), rate = 1 + static_cast<int64_t>(rng() % 16);
    const auto part = [] { return static_cast<double>(static_cast<float>(rng() % 100000) / 7000.0f); };
    const double low = part() - 10, high = low + part() + 1e-3;
    const Range<double> from = {low, high}, to = {low - part(), high + part()};
    std::vector<int64_t> parts[2] = {std::vector<int64_t>(bins), std::vector<int64_t>(bins)};
    for (int t = 0; t < 2; ++t) (t == 0 ? k : ref).parts_before(from, to, bins, rate, parts[t].data());
    ++compared;
    if (parts[0] != parts[1]) report(isa, "parts_before", bins, rate);
  }
}

template <class S, class T>
void compare_fake_quantize(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                           int64_t offset, bool hostile, bool periodic) {
  const auto x = random_buffer<S>(n, offset, hostile);
  const int64_t channels =
      periodic ? 64 + static_cast<int64_t>(rng() % 40) : 1 + static_cast<int64_t>(rng() % 3);
  const int64_t length = periodic ? channels + kPeriodPadding : channels;
  std::vector<T> arrays[7];
  QuantParams<T> p;
  p.quant_min = 0;
  p.quant_max = 255;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t c = i % channels;
    const bool fresh = i < channels;
    const T scale = fresh ? static_cast<T>(0.01 + 0.002 * double(rng() % 20)) : arrays[0][c];
    const T zero_point = fresh ? static_cast<T>(rng() % 256) : arrays[2][c];
    const T low = T(0) - zero_point, high = T(255) - zero_point;
    const T values[7] = {scale, T(1) / scale, zero_point, low, high, low - T(0.5), high + T(0.5)};
    for (int a = 0; a < 7; ++a) arrays[a].push_back(values[a]);
  }
  p.scale = arrays[0].data();
  p.inverse_scale = arrays[1].data();
  p.zero_point = arrays[2].data();
  p.low = arrays[3].data();
  p.high = arrays[4].data();
  p.low_edge = arrays[5].data();
  p.high_edge = arrays[6].data();
  p.inner = 1 + static_cast<int64_t>(rng() % 150);
  p.channels = channels;
  p.period = channels;
  p.exact = rng() % 4 == 0;
  p.float_zero_point = p.exact && rng() % 2 == 0;
  const int64_t begin = n < 64 ? 0 : static_cast<int64_t>(rng() % uint64_t(n / 64 + 1)) * 64;
  const int64_t words = (n + 63) / 64;
  for (bool with_mask : {true, false}) {
    std::vector<uint64_t> mask[2] = {std::vector<uint64_t>(words, 0), std::vector<uint64_t>(words, 0)};
    Buffer<S> y[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
    for (int t = 0; t < 2; ++t) {
      const auto& table = t == 0 ? k : ref;
      const auto kernel = periodic ? table.fake_quantize_periodic : table.fake_quantize_rows;
      if (begin < n) kernel(x.get(), y[t].get(), with_mask ? mask[t].data() : nullptr, begin, n, p);
    }
    ++compared;
    if (!same_bits(y[0].get(), y[1].get(), n)) report(isa, "fake_quantize", n, offset);
    if (mask[0] != mask[1]) report(isa, "fake_quantize mask", n, offset);

    Buffer<S> out[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
    k.mask_gradient(x.get(), mask[1].data(), out[0].get(), begin < n ? begin : 0, n);
    ref.mask_gradient(x.get(), mask[1].data(), out[1].get(), begin < n ? begin : 0, n);
    for (int64_t i = 0; i < n; ++i) {
      const auto a = to_compute(out[0].get()[i]), b = to_compute(out[1].get()[i]);
      if (!same_number(a, b) || (!std::isnan(a) && std::signbit(a) != std::signbit(b)))
        report(isa, "mask_gradient", n, offset);
    }
  }
}

template <class S, class T>
void compare_clamped_sum(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                         int64_t offset, bool hostile) {
  constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
  constexpr T kBounds[][2] = {{kNone, kNone}, {T(0), kNone}, {T(0), T(1)}, {T(-0.5), T(0.5)}};
  const T* const bounds = kBounds[rng() % 4];
  const auto a = random_buffer<S>(n, offset, hostile), b = random_buffer<S>(n, 0, hostile);
  const Summands<S, T> x = {a.get(), b.get(), bounds[0], bounds[1]};
  const int64_t begin = n < 64 ? 0 : static_cast<int64_t>(rng() % uint64_t(n / 64 + 1)) * 64;
  T low[4], high[4];
  bool nonfinite[2];
  int64_t count[2];
  for (int t = 0; t < 2; ++t) {
    (t == 0 ? k : ref).minmax_of_sum(x, begin, n, &low[t], &high[t], &nonfinite[t]);
    (t == 0 ? k : ref).minmax_finite_of_clamped_sum(x, begin, n, &low[2 + t], &high[2 + t], &count[t]);
  }
  ++compared;
  if (nonfinite[0] != nonfinite[1] || count[0] != count[1]) report(isa, "sum's nonfinite", n, offset);
  for (int t : {0, 2}) {
    if (!same_number(low[t], low[t + 1]) || !same_number(high[t], high[t + 1]))
      report(isa, "sum's minmax", n, offset);
  }
  // The second scale is no normal number, which takes the other quantizer.
  float scale[] = {0.02f, 1e-40f};
  int32_t zero_point = static_cast<int32_t>(rng() % 256);
  const Array z = {&zero_point, Element::i32, 1, "zero_point"};
  const int64_t words = (n + 63) / 64;
  for (bool with_mask : {true, false}) {
    for (int way = 0; way < 3; ++way) {
      const TensorParams<T> p(n, {&scale[way % 2], Element::f32, 1, "scale"}, z, 0, 255);
      std::vector<uint64_t> mask[2] = {std::vector<uint64_t>(words, 0), std::vector<uint64_t>(words, 0)};
      Buffer<S> y[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
      for (int t = 0; t < 2; ++t) {
        uint64_t* const bits = with_mask ? mask[t].data() : nullptr;
        const auto& table = t == 0 ? k : ref;
        if (begin >= n) continue;
        if (way < 2) table.fake_quantize_clamped_sum(x, y[t].get(), bits, begin, n, p.get());
        if (way == 2) table.clamped_sum(x, y[t].get(), bits, begin, n);
      }
      ++compared;
      if (!same_bits(y[0].get(), y[1].get(), n)) report(isa, "clamped sum", n, offset);
      if (mask[0] != mask[1]) report(isa, "clamped sum's mask", n, offset);
    }
  }
}

template <class S, class T>
void compare_learnable(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                       int64_t offset) {
  const auto x = random_buffer<S>(n, offset, false), grad = random_buffer<S>(n, offset, false);
  Buffer<S> out[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
  LearnableSums sums[2];
  for (int t = 0; t < 2; ++t) {
    sums[t] = (t == 0 ? k : ref)
                  .learnable_backward(grad.get(), x.get(), out[t].get(), n, T(0.02), T(50), T(3), T(-20), T(20),
                                      T(0.5));
  }
  ++compared;
  if (!same_bits(out[0].get(), out[1].get(), n)) report(isa, "learnable gradient", n, offset);
  const double tolerance = 1e-4 * (1 + std::sqrt(double(n)) * 20);
  if (std::abs(sums[0].scale - sums[1].scale) > tolerance ||
      std::abs(sums[0].zero_point - sums[1].zero_point) > tolerance) {
    report(isa, "learnable sums", n, offset);
  }
}

template <class S, class T>
void compare_folded_weight(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                           int64_t offset, bool hostile, bool wide) {
  const auto weight = random_buffer<S>(n, offset, hostile), grad = random_buffer<S>(n, offset, hostile);
  const ChannelFold<T> fold = {T(-0.7), T(1.5), T(0.02), T(50), T(3)};
  const int64_t reach = wide ? int64_t{1} << 30 : 20;
  Buffer<S> folded[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
  Buffer<S> out[2] = {Buffer<S>(n, offset), Buffer<S>(n, offset)};
  double sums[2];
  for (int t = 0; t < 2; ++t) {
    const auto& table = t == 0 ? k : ref;
    table.fold.forward(weight.get(), folded[t].get(), n, fold, -reach, reach);
    sums[t] = table.fold.backward(grad.get(), weight.get(), out[t].get(), n, fold, -reach, reach);
  }
  ++compared;
  if (!same_bits(folded[0].get(), folded[1].get(), n)) report(isa, "folded weight", n, offset);
  if (!same_bits(out[0].get(), out[1].get(), n)) report(isa, "folded weight's gradient", n, offset);
  if (!same_number(sums[0], sums[1])) report(isa, "folded weight's sum", n, offset);
  // The gradient may take the memory of the incoming one.
  std::copy(grad.get(), grad.get() + n, folded[0].get());
  k.fold.backward(folded[0].get(), weight.get(), folded[0].get(), n, fold, -reach, reach);
  if (!same_bits(folded[0].get(), out[1].get(), n)) report(isa, "folded weight's gradient in place", n, offset);
}

// Equal, or both NaN.
template <class S>
bool same_elements(const S* a, const S* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto x = to_compute(a[i]), y = to_compute(b[i]);
    if (!same_bits(&a[i], &b[i], 1) && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

bool same_moments(const ChunkMoments& a, const ChunkMoments& b) {
  if (a.finite != b.finite || !same_number(a.mean, b.mean)) return false;
  return !a.finite || (a.squares == b.squares && a.low == b.low && a.high == b.high);
}

// An activation whose quantizer is off, ordinary, or has a scale that is not a normal number.
template <class T>
Activation<T> random_activation() {
  const double scales[] = {0.02, 0.02, sizeof(T) == sizeof(float) ? 1e-40 : 1e-310};
  const uint64_t kind = rng() % 3;
  const double quantizer[] = {scales[kind], 7, kind == 0 ? 0.0 : 1.0};
  const double low = rng() % 2 == 0 ? 0 : -std::numeric_limits<double>::infinity();
  return activation_of<Scalar<T>>(quantizer, low, 6, 0, 255);
}

template <class S, class T>
void compare_batch_norm_rows(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int64_t n,
                             int64_t offset, bool hostile) {
  const auto x = random_buffer<S>(n, offset, hostile), grad = random_buffer<S>(n, offset, hostile);
  const int64_t rows = 1 + static_cast<int64_t>(rng() % uint64_t(std::min<int64_t>(n, 9))), length = n / rows;
  const ChannelChunk chunk = {rows, length, rows > 1 ? (n - length) / (rows - 1) : 0, 0};
  const ChannelNorm<T> norm = {T(0.25), T(0.9), rng() % 4 == 0 ? T(0) : T(1.5), T(-0.1)};
  const GradientMeans<T> means = {T(0.125), T(-0.3)};
  const Activation<T> activation = random_activation<T>();
  ChunkMoments moments[2];
  GradientSums sums[2] = {{0, 0}, {0, 0}};
  Buffer<S> y[2] = {{n, offset}, {n, offset}}, trained[2] = {{n, offset}, {n, offset}},
            frozen[2] = {{n, offset}, {n, offset}};
  for (int t = 0; t < 2; ++t) {
    const KernelsFor<S, T>& table = t == 0 ? k : ref;
    table.moments_of_rows(x.get(), chunk, &moments[t]);
    table.normalize_rows(x.get(), y[t].get(), chunk, norm, activation);
    table.gradient_sums_of_rows(grad.get(), x.get(), chunk, norm, activation.passing, &sums[t]);
    table.gradient_of_rows(grad.get(), x.get(), trained[t].get(), chunk, norm, activation.passing, &means);
    table.gradient_of_rows(grad.get(), x.get(), frozen[t].get(), chunk, norm, activation.passing, nullptr);
  }
  compared += 5;
  if (!same_moments(moments[0], moments[1])) report(isa, "moments_of_rows", n, offset);
  if (!same_elements(y[0].get(), y[1].get(), n)) report(isa, "normalize_rows", n, offset);
  if (!same_number(sums[0].of_bias, sums[1].of_bias) || !same_number(sums[0].of_gain, sums[1].of_gain))
    report(isa, "gradient_sums_of_rows", n, offset);
  if (!same_elements(trained[0].get(), trained[1].get(), n) ||
      !same_elements(frozen[0].get(), frozen[1].get(), n))
    report(isa, "gradient_of_rows", n, offset);
}

template <class S, class T>
void compare_batch_norm_columns(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref,
                                int64_t n, int64_t offset, bool hostile) {
  const auto x = random_buffer<S>(n, offset, hostile), grad = random_buffer<S>(n, offset, hostile);
  const int64_t columns = 1 + static_cast<int64_t>(rng() % uint64_t(std::min<int64_t>(n, 150)));
  const int64_t rows = n / columns, used = rows * columns;
  std::vector<T> arrays[5];
  for (auto& a : arrays) {
    for (int64_t c = 0; c < columns; ++c) a.push_back(static_cast<T>(random_number(false)));
  }
  const NormColumns<T> frozen_norm = {arrays[0].data(), arrays[1].data(), arrays[2].data(),
                                      nullptr,          nullptr,          rng() % 2 == 0};
  NormColumns<T> norm = frozen_norm;
  norm.offset = arrays[3].data(), norm.slope = arrays[4].data();
  const Activation<T> activation = random_activation<T>();
  std::vector<ChunkMoments> moments[2];
  std::vector<double> sums[2];
  Buffer<S> y[2] = {{n, offset}, {n, offset}}, trained[2] = {{n, offset}, {n, offset}},
            frozen[2] = {{n, offset}, {n, offset}};
  for (int t = 0; t < 2; ++t) {
    const KernelsFor<S, T>& table = t == 0 ? k : ref;
    std::vector<T> scratch(column_scratch(columns));
    std::vector<double> totals(2 * columns);
    moments[t].resize(columns);
    sums[t].assign(2 * columns, 0);
    table.moments_of_columns(x.get(), rows, columns, scratch.data(), totals.data(), moments[t].data());
    table.normalize_columns(x.get(), y[t].get(), rows, columns, norm, activation);
    table.gradient_sums_of_columns(grad.get(), x.get(), rows, columns, norm, activation.passing, scratch.data(),
                                   sums[t].data(), sums[t].data() + columns);
    table.gradient_of_columns(grad.get(), x.get(), trained[t].get(), rows, columns, norm, activation.passing);
    table.gradient_of_columns(grad.get(), x.get(), frozen[t].get(), rows, columns, frozen_norm,
                              activation.passing);
  }
  compared += 5;
  for (int64_t c = 0; c < columns; ++c) {
    if (!same_moments(moments[0][c], moments[1][c])) report(isa, "moments_of_columns", n, offset);
    if (!same_number(sums[0][c], sums[1][c]) || !same_number(sums[0][columns + c], sums[1][columns + c]))
      report(isa, "gradient_sums_of_columns", n, offset);
  }
  if (!same_elements(y[0].get(), y[1].get(), used)) report(isa, "normalize_columns", n, offset);
  if (!same_elements(trained[0].get(), trained[1].get(), used) ||
      !same_elements(frozen[0].get(), frozen[1].get(), used))
    report(isa, "gradient_of_columns", n, offset);
}

template <class S, class T>
void compare_type(const char* isa, const KernelsFor<S, T>& k, const KernelsFor<S, T>& ref, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    for (int64_t n : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000}) {
      const int64_t offset = static_cast<int64_t>(rng() % 5);
      const bool hostile = rng() % 2 == 0;
      compare_minmax(isa, k, ref, n, offset, hostile);
      compare_histogram(isa, k, ref, n, offset, hostile);
      compare_fake_quantize(isa, k, ref, n, offset, hostile, false);
      compare_fake_quantize(isa, k, ref, n, offset, hostile, true);
      compare_clamped_sum(isa, k, ref, n, offset, hostile);
      if (n > 0) {
        compare_batch_norm_rows(isa, k, ref, n, offset, hostile);
        compare_batch_norm_columns(isa, k, ref, n, offset, hostile);
      }
      compare_learnable(isa, k, ref, n, offset);
      compare_folded_weight(isa, k, ref, n, offset, hostile, round % 4 == 3);
    }
    // Longer than a block in which the histogram kernel looks for a frequent value.
    compare_histogram(isa, k, ref, 8000 + static_cast<int64_t>(rng() % 20000), round % 5, round % 2 == 0);
  }
  compare_parts_before(isa, k, ref, rounds);
}

void compare_search(const Kernels& k, const Kernels& ref, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t bins = 1 + static_cast<int64_t>(rng() % 300);
    std::vector<float> density(bins), scratch(bins);
    for (float& d : density) d = static_cast<float>(rng() % 1000) / 0.01f;
    const int64_t start = static_cast<int64_t>(rng() % uint64_t(bins));
    const int64_t end = start + static_cast<int64_t>(rng() % uint64_t(bins - start));
    const double a = k.quantization_error(density.data(), bins, 0.01, start, end, 256, scratch.data());
    const double b = ref.quantization_error(density.data(), bins, 0.01, start, end, 256, scratch.data());
    ++compared;
    if (!same_bits(&a, &b, 1)) report(k.isa, "quantization_error", bins, 0);
  }
}

void compare_quantize(const Kernels& k, const Kernels& ref, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = static_cast<int64_t>(rng() % 300), offset = static_cast<int64_t>(rng() % 5);
    const auto x = random_buffer<float>(n, offset, rng() % 2 == 0);
    std::vector<int8_t> out[2] = {std::vector<int8_t>(n), std::vector<int8_t>(n)};
    for (int t = 0; t < 2; ++t) (t == 0 ? k : ref).quantize(x.get(), out[t].data(), n, 60.0f, -128.0f, 127.0f);
    ++compared;
    if (out[0] != out[1]) report(k.isa, "quantize", n, offset);
  }
}

void compare_errors(const Kernels& k, const Kernels& ref, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = static_cast<int64_t>(rng() % 300), offset = static_cast<int64_t>(rng() % 5);
    const bool hostile = rng() % 2 == 0;
    const auto a = random_buffer<float>(n, offset, hostile), b = random_buffer<float>(n, offset, hostile);
    float scale = 0.03f;
    int64_t zero_point = 5;
    const TensorParams<float> params(n, {&scale, Element::f32, 1, "scale"},
                                     {&zero_point, Element::i64, 1, "zero_point"}, -20, 40);
    double sums[2][3];
    std::vector<uint8_t> used[2];
    int64_t clipped[2];
    for (int t = 0; t < 2; ++t) {
      const Kernels& table = t == 0 ? k : ref;
      table.error_sums(a.get(), b.get(), n, sums[t]);
      used[t].assign(62, 0);
      clipped[t] = table.mark_integers(a.get(), n, params.get(), used[t].data());
    }
    ++compared;
    for (int s = 0; s < 3; ++s) {
      if (!same_number(sums[0][s], sums[1][s])) report(k.isa, "error_sums", n, offset);
    }
    if (used[0] != used[1] || clipped[0] != clipped[1]) report(k.isa, "mark_integers", n, offset);
  }
}

// Kernels keep no state. This calls them from several threads at once, so that ThreadSanitizer can check it.
void run_in_threads(const Kernels& k) {
  std::vector<float> x(100000, 0.25f);
  std::vector<std::thread> threads;
  std::vector<float> lows(4), highs(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      bool nonfinite;
      k.f32.minmax(x.data(), static_cast<int64_t>(x.size()), &lows[t], &highs[t], &nonfinite);
      std::vector<uint32_t> counts(static_cast<size_t>(4 * histogram_stride(64)), 0);
      k.f32.histogram(x.data(), static_cast<int64_t>(x.size()), 0.0f, 1.0f, 64, counts.data(), 4);
    });
  }
  for (auto& t : threads) t.join();
  ++compared;
  if (lows != std::vector<float>(4, 0.25f)) report(k.isa, "threads", 0, 0);
}

int run(int rounds) {
  if (!set_isa("scalar")) return 2;
  const Kernels& ref = kernels();
  const Kernels* last = nullptr;
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    set_isa(usable_isa(i));
    const Kernels& k = kernels();
    if (&k == last) continue;  // an instruction set that differs in the kernels on quantized values only
    last = &k;
    compare_type(k.isa, k.f32, ref.f32, rounds);
    compare_type(k.isa, k.f64, ref.f64, rounds);
    compare_type(k.isa, k.f16, ref.f16, rounds);
    compare_type(k.isa, k.bf16, ref.bf16, rounds);
    compare_search(k, ref, rounds * 20);
    compare_errors(k, ref, rounds * 20);
    compare_quantize(k, ref, rounds * 20);
    run_in_threads(k);
    std::printf("%s: compared with scalar\n", k.isa);
  }
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant

int main(int argc, char** argv) { return fastquant::run(argc > 1 ? std::atoi(argv[1]) : 20); }
