// What the tests of operations on quantized values share: random values, buffers, and going through instruction
// sets. A program includes it once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

#include "testing.h"

namespace fastquant {
namespace {

int64_t between(int64_t first, int64_t last) { return first + int64_t(rng() % uint64_t(last - first + 1)); }

// Elements that begin at an offset into an allocation, which ends after the last of them: AddressSanitizer
// finds every access beyond them.
template <class X>
class Buffer {
 public:
  explicit Buffer(int64_t n) : offset_(pick({0, 1, 3})), size_(n), memory_(new X[size_t(n + offset_)]()) {}

  X* data() const { return memory_.get() + offset_; }
  int64_t size() const { return size_; }
  X& operator[](int64_t i) const { return data()[i]; }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), sizeof(X) * size_t(size_)) == 0;
  }

 private:
  int64_t offset_, size_;
  std::unique_ptr<X[]> memory_;
};

// Bytes of all values, the extreme ones more often than others.
template <class X = uint8_t>
Buffer<X> random_bytes(int64_t n) {
  Buffer<X> bytes(n);
  for (int64_t i = 0; i < n; ++i)
    bytes[i] = X(rng() % 4 == 0 ? pick({0, 127, 128, 255}) : int64_t(rng() % 256));
  return bytes;
}

// Values of up to 2.
inline Buffer<float> random_floats(int64_t n) {
  Buffer<float> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = float(between(-1000, 1000)) / 500.0f;
  return x;
}

// A zero point of unsigned or signed bytes.
inline int64_t random_zero_point(bool is_signed) {
  const int64_t least = is_signed ? -128 : 0;
  return least + pick({0, 255, between(0, 255)});
}

inline int64_t value_of(uint8_t byte, bool is_signed) { return is_signed ? int8_t(byte) : byte; }

// round(y) + zero_point as a byte, limited to [low, high], which are in units of `scale`.
inline uint8_t level(float y, double scale, int64_t zero_point, double low, double high, bool is_signed) {
  const double least = is_signed ? -128 : 0;
  const auto bound = [&](double b) {
    return std::min(std::max(std::nearbyint(b / scale) + double(zero_point), least), least + 255);
  };
  const double q = std::nearbyint(double(y)) + double(zero_point);
  return uint8_t(int64_t(std::min(std::max(q, bound(low)), bound(high))));
}

// Calls `test` for every instruction set that runs here, with one thread and with several, and reports.
template <class F>
int run_everywhere(const F& test) {
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    set_isa(usable_isa(i));
    for (int64_t t : {1, 3}) {
      threads = t;
      test();
    }
    std::printf("%s: compared\n", isa());
  }
  std::printf("%ld comparisons, %ld failed\n", long(compared), long(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastquant
