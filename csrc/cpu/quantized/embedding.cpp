#include "embedding.h"

#include <atomic>
#include <vector>

#include "../arrays.h"
#include "kernels.h"

namespace fastquant {
namespace {

// Numbers of rows are made of so many indices at a time, or of those of one bag.
constexpr int64_t kIndicesAtOnce = 1024;

const EmbeddingKernels::OfBits& kernels_for(int64_t bits) {
  const EmbeddingKernels& kernels = *quantized_kernels().embedding;
  return bits == 8 ? kernels.of_bytes : kernels.of_nibbles;
}

int64_t value_bytes_of(int64_t dim, int64_t bits) {
  check(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  check(dim > 0, "dim must be positive, got ", dim);
  return (std::max<int64_t>(dim, 16) * bits + 7) / 8;
}

EmbeddingRows rows_of(const EmbeddingTable& t) {
  return {t.data, t.rows, t.dim, value_bytes_of(t.dim, t.bits), embedding_row_bytes(t.dim, t.bits)};
}

int64_t at(const Integers1d& x, int64_t i) {
  return x.type == Element::i32 ? static_cast<const int32_t*>(x.data)[i]
                                : static_cast<const int64_t*>(x.data)[i];
}

void check_integers(const Integers1d& x, const char* name) {
  check(x.type == Element::i32 || x.type == Element::i64, name, " must be int32 or int64");
}

// From indices to numbers of rows.
class Indices {
 public:
  static constexpr int64_t kZeros = -1, kNone = -2;

  Indices(const EmbeddingTable& table, const Integers1d& indices, const Integers1d& mapping)
      : indices_(indices), mapping_(mapping), rows_(table.rows) {
    check_integers(indices, "indices");
    if (mapping.data == nullptr) return;
    check_integers(mapping, "mapping");
    // The mapping that torch has for a table from which no row was removed.
    if (mapping.count == 1 && at(mapping, 0) == 0) mapping_.data = nullptr;
  }

  int64_t index(int64_t position) const { return at(indices_, position); }

  // The number of a row, kZeros for a row of zeros, or one that no row has.
  int64_t row(int64_t position) const {
    const int64_t i = index(position);
    if (mapping_.data == nullptr) return i < 0 ? kNone : i;
    return i < 0 || i >= mapping_.count ? kNone : at(mapping_, i);
  }

  // The indices themselves, where they are numbers of rows.
  const int64_t* numbers() const {
    return mapping_.data == nullptr && indices_.type == Element::i64
               ? static_cast<const int64_t*>(indices_.data)
               : nullptr;
  }

  // Throws an error that names the first index, other than `padding`, that has no row.
  void raise(std::optional<int64_t> padding) const {
    for (int64_t i = 0; i < indices_.count; ++i) {
      const int64_t number = row(i);
      if (index(i) == padding || number == kZeros || (number >= 0 && number < rows_)) continue;
      if (number != kNone && mapping_.data != nullptr) {
        check(false, "mapping[", index(i), "] is ", number, ", the embedding has ", rows_, " rows");
      }
      check(false, "indices[", i, "] is ", index(i), ", the embedding has ",
            mapping_.data != nullptr ? mapping_.count : rows_, " rows");
    }
  }

 private:
  Integers1d indices_, mapping_;
  int64_t rows_;
};

// Where bags begin, and where the last one ends.
std::vector<int64_t> bounds_of(const Bags& bags, int64_t indices) {
  std::vector<int64_t> bounds(bags.count + 1);
  if (bags.offsets.data == nullptr) {
    for (int64_t b = 0; b <= bags.count; ++b) bounds[b] = b * bags.size;
    return bounds;
  }
  check_integers(bags.offsets, "offsets");
  bounds[bags.count] = indices;
  int64_t before = 0;
  for (int64_t b = 0; b < bags.count + bags.ends; ++b) {
    bounds[b] = at(bags.offsets, b);
    check(b > 0 || bounds[0] == 0, "offsets[0] must be 0, got ", bounds[0]);
    check(bounds[b] >= before && bounds[b] <= indices, "offsets[", b, "] must be at least offsets[", b - 1,
          "], ", before, ", and at most the number of indices, ", indices, "; got ", bounds[b]);
    before = bounds[b];
  }
  return bounds;
}

// Makes bags, on one thread.
class BagMaker {
 public:
  BagMaker(const EmbeddingTable& table, const Indices& indices, const Bags& bags,
           const std::vector<int64_t>& bounds, float* out)
      : kernels_(kernels_for(table.bits)),
        rows_(rows_of(table)),
        indices_(indices),
        bags_(bags),
        bounds_(bounds),
        out_(out) {}

  // Returns false where an index has no row.
  bool make(int64_t begin, int64_t end) {
    const int64_t* const numbers = bags_.padding.has_value() ? nullptr : indices_.numbers();
    if (numbers == nullptr) return make_translated(begin, end);
    bool found = true;
    for (int64_t bag = begin; bag < end; ++bag) {
      const int64_t first = bounds_[bag], count = bounds_[bag + 1] - first;
      const float* const weights = bags_.weights == nullptr ? nullptr : bags_.weights + first;
      found &= reduce({numbers + first, count, bounds_.back() - first}, weights, 0, out_ + bag * rows_.dim);
    }
    return found;
  }

 private:
  // The rows of a bag whose indices had to be read one by one.
  struct Translated {
    int64_t rows, zeros;
  };

  bool make_translated(int64_t begin, int64_t end) {
    bool found = true;
    for (int64_t bag = begin; bag < end;) {
      numbers_.clear();
      weights_.clear();
      translated_.clear();
      const int64_t first = bag;
      do {
        translated_.push_back(translate(bag++));
      } while (bag < end && bounds_[bag + 1] - bounds_[first] <= kIndicesAtOnce);
      int64_t at = 0;
      for (int64_t k = first; k < bag; ++k) {
        const auto [rows, zeros] = translated_[k - first];
        const RowNumbers numbers = {numbers_.data() + at, rows, static_cast<int64_t>(numbers_.size()) - at};
        const float* const weights = bags_.weights == nullptr ? nullptr : weights_.data() + at;
        found &= reduce(numbers, weights, zeros, out_ + k * rows_.dim);
        at += rows;
      }
    }
    return found;
  }

  Translated translate(int64_t bag) {
    Translated counts = {0, 0};
    for (int64_t i = bounds_[bag]; i < bounds_[bag + 1]; ++i) {
      if (indices_.index(i) == bags_.padding) continue;
      const int64_t number = indices_.row(i);
      if (number == Indices::kZeros) {
        ++counts.zeros;
        continue;
      }
      ++counts.rows;
      numbers_.push_back(number);
      if (bags_.weights != nullptr) weights_.push_back(bags_.weights[i]);
    }
    return counts;
  }

  // One bag of rows, and of so many rows of zeros.
  bool reduce(const RowNumbers& numbers, const float* weights, int64_t zeros, float* out) const {
    if (numbers.count == 0) {
      std::fill_n(out, rows_.dim, 0.0f);
      return true;
    }
    if (bags_.mode != BagMode::max) {
      const float divisor = bags_.mode == BagMode::mean ? static_cast<float>(numbers.count + zeros) : 1.0f;
      return kernels_.sum(rows_, numbers, weights, divisor, out);
    }
    const bool found = kernels_.max(rows_, numbers, out);
    if (zeros > 0) std::transform(out, out + rows_.dim, out, [](float x) { return std::max(x, 0.0f); });
    return found;
  }

  const EmbeddingKernels::OfBits& kernels_;
  const EmbeddingRows rows_;
  const Indices& indices_;
  const Bags& bags_;
  const std::vector<int64_t>& bounds_;
  float* const out_;
  std::vector<int64_t> numbers_;
  std::vector<float> weights_;
  std::vector<Translated> translated_;
};

}  // namespace

int64_t embedding_row_bytes(int64_t dim, int64_t bits) {
  return value_bytes_of(dim, bits) + 2 * static_cast<int64_t>(sizeof(float));
}

void embedding(const EmbeddingTable& table, const Integers1d& given, float* out) {
  const EmbeddingRows rows = rows_of(table);
  const Indices indices(table, given, {nullptr, Element::i64, 0});
  const auto& kernels = kernels_for(table.bits);
  std::atomic<bool> found{true};
  for_pieces(given.count, piece_count(given.count * table.dim), 1, [&](int64_t, int64_t begin, int64_t end) {
    int64_t numbers[kIndicesAtOnce];
    while (begin < end) {
      const int64_t count = std::min(end - begin, kIndicesAtOnce);
      RowNumbers part = {indices.numbers(), count, count};
      if (part.data != nullptr) {
        part.data += begin;
        part.readable = given.count - begin;
      } else {
        for (int64_t i = 0; i < count; ++i) numbers[i] = indices.row(begin + i);
        part.data = numbers;
      }
      if (!kernels.expand(rows, part, out + begin * table.dim)) found = false;
      begin += count;
    }
  });
  if (!found) indices.raise(std::nullopt);
}

void embedding_bag(const EmbeddingTable& table, const Integers1d& given, const Bags& bags, float* out) {
  const Indices indices(table, given, bags.mapping);
  const std::vector<int64_t> bounds = bounds_of(bags, given.count);
  const int64_t pieces = piece_count(given.count * table.dim);
  // The bag that a piece begins with, so that each has about as many indices.
  const auto first_of = [&](int64_t piece) {
    if (piece == 0 || piece == pieces) return piece == 0 ? 0 : bags.count;
    return std::lower_bound(bounds.begin(), bounds.end() - 1, bounds.back() * piece / pieces) - bounds.begin();
  };
  std::atomic<bool> found{true};
  for_pieces(pieces, pieces, 1, [&](int64_t, int64_t begin, int64_t end) {
    if (!BagMaker(table, indices, bags, bounds, out).make(first_of(begin), first_of(end))) found = false;
  });
  if (!found) indices.raise(bags.padding);
}

}  // namespace fastquant
