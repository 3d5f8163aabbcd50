// Sums of bytes, element by element of a vector.
#pragma once

#include "../bytes.h"

namespace fastquant {
namespace {

// Sums of bytes.
template <class B>
class Sums {
 public:
  Sums() {
    for (auto& s : sums_) s = B::ints1(0);
    clear();
  }

  void add(typename B::Reg x) {
    B::add_bytes(x, words_);
    if (++pending_ == kMostPending) flush();
  }

  const typename B::Ints* sums() {
    flush();
    return sums_;
  }

 private:
  static constexpr int kMostPending = 257;  // times 255 fits in 16 bits

  void clear() {
    for (auto& w : words_) w = B::words1(0);
    pending_ = 0;
  }
  void flush() {
    B::add_words(words_, sums_);
    clear();
  }

  typename B::Words words_[B::kHalves];
  typename B::Ints sums_[B::kParts];
  int pending_;
};

}  // namespace
}  // namespace fastquant
