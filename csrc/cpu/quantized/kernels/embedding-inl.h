// The bodies of the kernels for embeddings. Everything here is in an anonymous namespace, and std:: is not
// used: see ../../kernels-inl.h.
#pragma once

#include "../../kernels/prefetch-inl.h"
#include "../bytes.h"
#include "../embedding_kernels.h"
#include "unrolled-inl.h"

namespace fastquant {
namespace {

// The elements of a row from `first` on.
template <class B, int kBits>
struct EmbeddingRow {
  using F = typename B::Floats;

  FASTQUANT_INLINE EmbeddingRow(const EmbeddingRows& rows, int64_t number, int64_t first) {
    const uint8_t* const row = rows.data + number * rows.row_bytes;
    float numbers[2];
    __builtin_memcpy(numbers, row + rows.value_bytes, sizeof(float));
    __builtin_memcpy(numbers + 1, row + rows.value_bytes + sizeof(float), sizeof(float));
    scale = F::set1(numbers[0]);
    // The same as their product, which compilers would compute of scalars and broadcast by shuffles.
    bias = F::madd(F::set1(numbers[1]), scale, F::set1(-0.0f));
    values = kBits == 8 ? row + first : row + first / 2;
    odd = kBits == 8 ? 0 : first % 2;
  }

  // F::N elements, kOffset of them after the first.
  template <int kOffset>
  FASTQUANT_INLINE typename F::Reg at(Index<kOffset>) const {
    if constexpr (kBits == 8) {
      return F::madd(B::floats_of_bytes(values + kOffset), scale, bias);
    } else {
      return F::madd(B::floats_of_nibbles(values, kOffset + (F::N == 1 ? odd : 0)), scale, bias);
    }
  }

  typename F::Reg scale, bias;
  const uint8_t* values;
  int64_t odd;  // where the first element is the upper half of a byte, as only vectors of one element begin
};

constexpr int64_t kRowsAhead = 16;

// Prefetches kBytes bytes of a row that is looked up soon, and what is behind its values.
template <int kBytes>
FASTQUANT_INLINE void fetch_row(const EmbeddingRows& rows, const RowNumbers& numbers, int64_t k,
                                int64_t begin) {
  const int64_t number = numbers.data[smaller(k + kRowsAhead, numbers.readable - 1)];
  // No arithmetic of pointers, because there may be no row of this number.
  const uintptr_t row = reinterpret_cast<uintptr_t>(rows.data) +
                        static_cast<uintptr_t>(number) * static_cast<uintptr_t>(rows.row_bytes);
  unrolled<(kBytes + 63) / 64>([&](auto line) FASTQUANT_INLINE_LAMBDA {
    __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(begin + 64 * line)));
  });
  __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(rows.row_bytes - 1)));
}

FASTQUANT_INLINE bool has_row(const EmbeddingRows& rows, int64_t number) {
  return static_cast<uint64_t>(number) < static_cast<uint64_t>(rows.count);
}

// What becomes of kVectors vectors of elements of the rows, from `first` on, in registers.
template <class B, int kBits, int kVectors, class Of>
FASTQUANT_INLINE bool reduce(const EmbeddingRows& given_rows, const RowNumbers& given_numbers, int64_t first,
                             const Of& of, typename B::Floats::Reg (&results)[kVectors]) {
  using F = typename B::Floats;
  const EmbeddingRows rows = given_rows;
  const RowNumbers numbers = given_numbers;
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA { results[v] = of.start(); });
  for (int64_t k = 0; k < numbers.count; ++k) {
    const int64_t number = numbers.data[k];
    if (!has_row(rows, number)) return false;
    fetch_row<kVectors * F::N * kBits / 8>(rows, numbers, k, first * kBits / 8);
    const EmbeddingRow<B, kBits> row(rows, number, first);
    const auto weight = of.weight(k);
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      results[v] = of.with(results[v], row.at(Index<v * F::N>()), weight);
    });
  }
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA { results[v] = of.end(results[v]); });
  return true;
}

template <class B, int kBits, int kVectors, class Of>
bool reduce_to(const EmbeddingRows& rows, const RowNumbers& numbers, int64_t first, const Of& of, float* out) {
  using F = typename B::Floats;
  typename F::Reg results[kVectors];
  if (!reduce<B, kBits, kVectors>(rows, numbers, first, of, results)) return false;
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA { F::store(out + first + v * F::N, results[v]); });
  return true;
}

// The last vector of elements that are no whole number of vectors begins where it ends with them: at an even
// element, as halves of bytes need it.
template <class F>
int64_t begin_of_last(int64_t dim) {
  return dim < F::N ? 0 : dim + dim % 2 - F::N;
}

template <class F>
void store_last(float* out, int64_t begin, int64_t dim, typename F::Reg x) {
  float elements[F::N];
  F::store(elements, x);
  __builtin_memcpy(out + begin, elements, (dim - begin) * sizeof(float));
}

template <class B, int kBits, class Of>
bool reduce_rows(const EmbeddingRows& rows, const RowNumbers& numbers, const Of& of, float* out) {
  using F = typename B::Floats;
  const int64_t dim = rows.dim;
  int64_t i = 0;
  bool found = true;
  const auto vectors = [&](auto v) FASTQUANT_INLINE_LAMBDA {
    for (; found && i + v * F::N <= dim; i += v * F::N) {
      found = reduce_to<B, kBits, v>(rows, numbers, i, of, out);
    }
  };
  vectors(Index<8>());
  vectors(Index<4>());
  vectors(Index<2>());
  vectors(Index<1>());
  if (!found || i == dim) return found;
  const int64_t begin = begin_of_last<F>(dim);
  typename F::Reg last[1];
  if (!reduce<B, kBits, 1>(rows, numbers, begin, of, last)) return false;
  store_last<F>(out, begin, dim, last[0]);
  return true;
}

template <class F, bool kWeighted>
struct SumOfRows {
  using Reg = typename F::Reg;

  Reg start() const { return F::set1(0.0f); }
  Reg weight(int64_t k) const {
    if constexpr (kWeighted) return F::set1(weights[k]);
    return start();
  }
  Reg with(Reg sum, Reg value, Reg weight) const {
    return kWeighted ? F::madd(value, weight, sum) : F::add(sum, value);
  }
  Reg end(Reg sum) const { return divisor == 1.0f ? sum : F::div(sum, F::set1(divisor)); }

  const float* weights;
  float divisor;
};

template <class F>
struct MaxOfRows {
  using Reg = typename F::Reg;

  Reg start() const { return F::set1(-__builtin_inff()); }
  Reg weight(int64_t) const { return start(); }
  Reg with(Reg most, Reg value, Reg) const { return F::max(most, value); }
  Reg end(Reg most) const { return most; }
};

template <class B, int kBits>
bool sum_rows(const EmbeddingRows& rows, const RowNumbers& numbers, const float* weights, float divisor,
              float* out) {
  using F = typename B::Floats;
  if (weights != nullptr) {
    return reduce_rows<B, kBits>(rows, numbers, SumOfRows<F, true>{weights, divisor}, out);
  }
  return reduce_rows<B, kBits>(rows, numbers, SumOfRows<F, false>{weights, divisor}, out);
}

template <class B, int kBits>
bool max_of_rows(const EmbeddingRows& rows, const RowNumbers& numbers, float* out) {
  return reduce_rows<B, kBits>(rows, numbers, MaxOfRows<typename B::Floats>{}, out);
}

template <class B, int kBits>
bool expand_rows(const EmbeddingRows& rows, const RowNumbers& numbers, float* out) {
  using F = typename B::Floats;
  const int64_t dim = rows.dim, whole = dim / F::N * F::N;
  for (int64_t k = 0; k < numbers.count; ++k, out += dim) {
    const int64_t number = numbers.data[k];
    if (!has_row(rows, number)) return false;
    for (int64_t byte = 0; byte < rows.value_bytes; byte += 128) fetch_row<128>(rows, numbers, k, byte);
    for (int64_t i = 0; i < whole; i += F::N) {
      F::store(out + i, EmbeddingRow<B, kBits>(rows, number, i).at(Index<0>()));
    }
    if (whole == dim) continue;
    const int64_t begin = begin_of_last<F>(dim);
    store_last<F>(out, begin, dim, EmbeddingRow<B, kBits>(rows, number, begin).at(Index<0>()));
  }
  return true;
}

template <class B>
constexpr EmbeddingKernels embedding_table() {
  static_assert(has_bytes_interface<B>(), "see bytes.h");
  return {{expand_rows<B, 8>, sum_rows<B, 8>, max_of_rows<B, 8>},
          {expand_rows<B, 4>, sum_rows<B, 4>, max_of_rows<B, 4>}};
}

}  // namespace
}  // namespace fastquant
