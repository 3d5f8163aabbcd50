// The interface of vectors of bytes, in which the elementwise and pooling kernels are written. There is one
// type for each instruction set: bytes_*.h. Bytes are unsigned here: an int8 value is taken as the uint8 value
// whose sign bit is flipped, with a zero point that is larger by 128.
//
// Types and constants
//   N                      elements of a vector
//   Reg                    N bytes
//   Floats                 the vector type of fp32 (../../math/vector.h)
//   kParts                 how many vectors of fp32 or int32 hold N elements
//   Words, kHalves         vectors of 16-bit integers, and how many of them hold N elements
//   Ints                   vectors of 32-bit integers
//
// Bytes
//   set1(b), load(p), store(p, x)
//   load_some(p, n)        the first n bytes from p, n < N; the others are 0. Touches no other memory
//   store_some(p, x, n)    the first n bytes, n < N. Touches no other memory
//   flip(a, b)             a ^ b
//   min, max(a, b)
//
// Arithmetic. An array of kParts (kHalves) vectors holds N elements in an order of the type's own, the same in
// all of these functions.
//   widen(x, center, y)    y = x - center, exactly, where center is from center_of(zero_point)
//   narrow(y, zero_point)  y rounded to nearest, ties to even, plus the zero point, from words1(zero_point),
//                          limited to 0 and 255. Any y; NaN gives 255
//   narrow_few(y, zero_point)  the same for -2^20 <= y <= 2^20, which may take less time
//   add_bytes(x, words)    adds x to the unsigned words
//   add_words(words, ints) adds unsigned words to the ints
//   squares(x, words)      the squares, as unsigned words
//   to_float(ints)         of one vector
//   ints1(i), sub(a, b)    vectors of ints
//   add(a, b)              vectors of words
//
// Elements in the order of memory
//   load_centered(p, f, center, y)   widen(flip(load(p), f), center, y)
//   narrow_in_order(y, zero_point)
//   store_ints(p, ints)    of one vector; element i of vector k belongs to byte index_of(k, i)
//   transpose(p, s, out, t)   of 16 rows of 16 bytes: out[c * t + r] = p[r * s + c]
//   interleave3(p, s, out)    of 3 rows of 16 bytes: out[3 * c + r] = p[r * s + c]
//
// Floats::N elements as fp32, in the order of memory
//   floats_of_bytes(p)         from p on
//   floats_of_nibbles(p, i)    elements i and on of halves of bytes, the lower half first; i is a multiple of
//                              min(2, Floats::N)
//
// Look-up
//   Table                  a table of 256 bytes, in registers where that pays
//   look_up(table, x)      table[x]
//   kLooksUpFast           whether that takes less time than requantizing x
#pragma once

#include <cstdint>

namespace fastquant {
namespace {

// What every table of kernels asserts: it compiles, or it does not.
template <class B>
constexpr bool has_bytes_interface() {
  using Reg = typename B::Reg;
  using Words = typename B::Words;
  using Ints = typename B::Ints;
  using Float = typename B::Floats::Reg;
  [[maybe_unused]] constexpr Reg (*kSet1)(uint8_t) = B::set1;
  [[maybe_unused]] constexpr Reg (*kLoad)(const uint8_t*) = B::load;
  [[maybe_unused]] constexpr void (*kStore)(uint8_t*, Reg) = B::store;
  [[maybe_unused]] constexpr Reg (*kLoadSome)(const uint8_t*, int64_t) = B::load_some;
  [[maybe_unused]] constexpr void (*kStoreSome)(uint8_t*, Reg, int64_t) = B::store_some;
  [[maybe_unused]] constexpr Reg (*kBinary[])(Reg, Reg) = {B::flip, B::min, B::max};
  [[maybe_unused]] constexpr Words (*kWords1)(int) = B::words1;
  [[maybe_unused]] constexpr void (*kWiden)(Reg, Float, Float*) = B::widen;
  [[maybe_unused]] constexpr Reg (*kNarrow[])(const Float*, Words) = {B::narrow, B::narrow_few,
                                                                      B::narrow_in_order};
  [[maybe_unused]] constexpr void (*kToWords[])(Reg, Words*) = {B::add_bytes, B::squares};
  [[maybe_unused]] constexpr void (*kAddWords)(const Words*, Ints*) = B::add_words;
  [[maybe_unused]] constexpr Float (*kToFloat)(Ints) = B::to_float;
  [[maybe_unused]] constexpr Ints (*kInts1)(int32_t) = B::ints1;
  [[maybe_unused]] constexpr Ints (*kSub)(Ints, Ints) = B::sub;
  [[maybe_unused]] constexpr Words (*kAdd)(Words, Words) = B::add;
  [[maybe_unused]] constexpr void (*kLoadCentered)(const uint8_t*, Reg, Float, Float*) = B::load_centered;
  [[maybe_unused]] constexpr void (*kStoreInts)(int32_t*, Ints) = B::store_ints;
  [[maybe_unused]] constexpr int (*kIndexOf)(int, int) = B::index_of;
  [[maybe_unused]] constexpr Float (*kOfBytes)(const uint8_t*) = B::floats_of_bytes;
  [[maybe_unused]] constexpr Float (*kOfNibbles)(const uint8_t*, int64_t) = B::floats_of_nibbles;
  [[maybe_unused]] constexpr void (*kTranspose)(const uint8_t*, int64_t, uint8_t*, int64_t) = B::transpose;
  [[maybe_unused]] constexpr void (*kInterleave3)(const uint8_t*, int64_t, uint8_t*) = B::interleave3;
  [[maybe_unused]] constexpr Reg (*kLookUp)(const typename B::Table&, Reg) = B::look_up;
  [[maybe_unused]] constexpr bool kLooksUpFast = B::kLooksUpFast;
  return B::N == B::kParts * B::Floats::N;
}

}  // namespace
}  // namespace fastquant
