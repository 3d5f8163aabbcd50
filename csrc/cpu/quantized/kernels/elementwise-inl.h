// The bodies of the elementwise kernels. Everything here is in an anonymous namespace, and std:: is not used:
// see ../../kernels-inl.h.
#pragma once

#include "../../kernels/prefetch-inl.h"
#include "../elementwise_kernels.h"
#include "output_of-inl.h"
#include "vectors-inl.h"

namespace fastquant {
namespace {

// --------------------------------------------------------------------------- and floats
//
// Only the floats are prefetched. They are most of the memory, and prefetching the bytes, too, took longer.

// The zero point is added before rounding, and in the same operation as the product is rounded, because that is
// what torch.quantize_per_tensor does. It is that of int8 here, for int8.
template <class B>
struct Quantizer {
  using F = typename B::Floats;

  Quantizer(float inverse, const Output& o)
      : output({o.flip, o.low, o.high, o.flip}),
        inverse_scale(F::set1(inverse)),
        zero_point(F::set1(static_cast<float>(o.zero_point - o.flip))) {}

  // B::N elements.
  template <class S>
  typename B::Reg value(const S* x) const {
    typename F::Reg y[B::kParts];
    for (int k = 0; k < B::kParts; ++k) y[k] = F::madd(F::load(x + k * F::N), inverse_scale, zero_point);
    return output.value_in_order(y);
  }
  // The same for the first n < B::N elements, which are the only ones that are read.
  template <class S>
  typename B::Reg value_of_some(const S* x, int64_t n) const {
    S copy[B::N] = {};
    __builtin_memcpy(copy, x, n * sizeof(S));
    return value(copy);
  }

  OutputOf<B> output;
  typename F::Reg inverse_scale, zero_point;
};

template <class B, class S>
void quantize(Rows<const S> x, Rows<uint8_t> out, int64_t rows, int64_t columns, float inverse_scale,
              const Output& output) {
  const Quantizer<B> quantizer(inverse_scale, output);
  for (int64_t r = 0; r < rows; ++r) {
    const S* const from = x.data + r * x.stride;
    uint8_t* const at = out.data + r * out.stride;
    int64_t i = 0;
    for (; i + B::N <= columns; i += B::N) {
      fetch_ahead<B::N>(from + i);
      B::store(at + i, quantizer.value(from + i));
    }
    if (i < columns) B::store_some(at + i, quantizer.value_of_some(from + i, columns - i), columns - i);
  }
}

// A small matrix of bytes, which is filled row by row and read column by column.
constexpr int kTileRows = 16, kTileColumns = 64;

struct Tile {
  alignas(64) uint8_t data[kTileRows][kTileColumns];
};

// Transposes a matrix of rows x columns in tiles. fill(c, r, count, p) writes count <= kTileColumns elements of
// column c of the output, from row r on, to p, where there is room for kTileColumns.
template <class B, class Fill>
void transpose_tiles(Rows<uint8_t> out, int64_t rows, int64_t columns, const Fill& fill) {
  Tile tile = {};
  for (int64_t r = 0; r < rows; r += kTileColumns) {
    const int64_t height = smaller(kTileColumns, rows - r);
    for (int64_t c = 0; c < columns; c += kTileRows) {
      const int64_t width = smaller(kTileRows, columns - c);
      for (int64_t k = 0; k < width; ++k) fill(c + k, r, height, tile.data[k]);
      for (int64_t k = 0; k < height; k += 16) {
        uint8_t* const to = out.data + (r + k) * out.stride + c;
        const int64_t count = smaller(16, height - k);
        if (count == 16 && width == 16) {
          B::transpose(tile.data[0] + k, kTileColumns, to, out.stride);
        } else if (count == 16 && columns == 3 && out.stride == 3) {
          B::interleave3(tile.data[0] + k, kTileColumns, to);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < width; ++j) to[i * out.stride + j] = tile.data[j][k + i];
          }
        }
      }
    }
  }
}

template <class B, class S>
void quantize_transposed(Rows<const S> x, Rows<uint8_t> out, int64_t rows, int64_t columns, float inverse_scale,
                         const Output& output) {
  static_assert(kTileColumns % B::N == 0);
  const Quantizer<B> quantizer(inverse_scale, output);
  transpose_tiles<B>(out, rows, columns, [&](int64_t c, int64_t r, int64_t count, uint8_t* p) {
    const S* const from = x.data + c * x.stride + r;
    int64_t i = 0;
    for (; i + B::N <= count; i += B::N) {
      fetch_ahead<B::N>(from + i, 1024);
      B::store(p + i, quantizer.value(from + i));
    }
    if (i < count) B::store(p + i, quantizer.value_of_some(from + i, count - i));
  });
}

template <class B>
void transpose(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns) {
  transpose_tiles<B>(out, rows, columns, [&](int64_t c, int64_t r, int64_t count, uint8_t* p) {
    const uint8_t* const from = x.data + c * x.stride + r;
    for_vectors<B>(count, [&](int64_t i, const auto& load, const auto&) { B::store(p + i, load(from + i)); });
  });
}

template <class B, class S>
void dequantize(const uint8_t* x, S* out, int64_t n, const Operand& operand) {
  using F = typename B::Floats;
  const OperandOf<B> of(operand);
  const auto convert = [&](const uint8_t* from, S* to) {
    typename F::Reg y[B::kParts];
    B::load_centered(from, of.flip, of.center, y);
    for (int k = 0; k < B::kParts; ++k) F::store(to + k * F::N, F::mul(y[k], of.ratio));
  };
  int64_t i = 0;
  for (; i + B::N <= n; i += B::N) {
    fetch_ahead<B::N>(out + i);
    convert(x + i, out + i);
  }
  if (i < n) {
    uint8_t from[B::N] = {};
    S to[B::N];
    __builtin_memcpy(from, x + i, n - i);
    convert(from, to);
    __builtin_memcpy(out + i, to, (n - i) * sizeof(S));
  }
}

// ------------------------------------------------------------------------- bytes to bytes

template <class B>
struct Sum {
  static float most_steps(const Operand& of_a, const Operand& of_b) {
    return 255.0f * (of_a.ratio + of_b.ratio);
  }

  template <class OperandOf>
  static void steps(typename B::Reg a, typename B::Reg b, const OperandOf& of_a, const OperandOf& of_b,
                    typename B::Floats::Reg* y) {
    typename B::Floats::Reg more[B::kParts];
    of_a.steps(a, y);
    of_b.steps(b, more);
    for (int k = 0; k < B::kParts; ++k) y[k] = B::Floats::add(y[k], more[k]);
  }
};

template <class B>
struct Product {
  static float most_steps(const Operand& of_a, const Operand&) { return 255.0f * 255.0f * of_a.ratio; }

  template <class OperandOf>
  static void steps(typename B::Reg a, typename B::Reg b, const OperandOf& of_a, const OperandOf& of_b,
                    typename B::Floats::Reg* y) {
    using F = typename B::Floats;
    typename F::Reg factor[B::kParts];
    of_a.centered(a, y);
    of_b.centered(b, factor);
    for (int k = 0; k < B::kParts; ++k) y[k] = F::mul(F::mul(y[k], factor[k]), of_a.ratio);
  }
};

template <class B, template <class> class Of, bool kPlain>
void binary_rows(Rows<const uint8_t> a, Rows<const uint8_t> b, bool one_b, Rows<uint8_t> out, int64_t rows,
                 int64_t columns, const Operand& of_a, const Operand& of_b, const Output& output) {
  const OperandOf<B, kPlain> left(of_a), right(of_b);
  const OutputOf<B, kPlain> to(output);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* const p = a.data + r * a.stride;
    const uint8_t* const q = b.data + r * b.stride;
    uint8_t* const at = out.data + r * out.stride;
    const auto row = [&](const auto& load_b) {
      for_vectors<B>(columns, [&](int64_t i, const auto& load, const auto& store) {
        fetch_ahead<B::N>(p + i);
        fetch_ahead<B::N>(q + i);
        typename B::Floats::Reg y[B::kParts];
        Of<B>::steps(load(p + i), load_b(i, load), left, right, y);
        store(at + i, to.value(y));
      });
    };
    if (one_b) {
      row([same = B::set1(*q)](int64_t, const auto&) { return same; });
    } else {
      row([q](int64_t i, const auto& load) { return load(q + i); });
    }
  }
}

template <class B, template <class> class Of>
void binary(Rows<const uint8_t> a, Rows<const uint8_t> b, bool one_b, Rows<uint8_t> out, int64_t rows,
            int64_t columns, const Operand& of_a, const Operand& of_b, const Output& output) {
  const bool plain = (of_a.flip | of_b.flip | output.flip) == 0 && Of<B>::most_steps(of_a, of_b) <= 0x1p20f;
  const auto run = plain ? binary_rows<B, Of, true> : binary_rows<B, Of, false>;
  run(a, b, one_b, out, rows, columns, of_a, of_b, output);
}

// out = f(x), for vectors of each row.
template <class B, class F>
void map_rows(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns, const F& f) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* const from = x.data + r * x.stride;
    uint8_t* const at = out.data + r * out.stride;
    for_vectors<B>(columns, [&](int64_t i, const auto& load, const auto& store) {
      fetch_ahead<B::N>(from + i);
      fetch_ahead<B::N>(at + i);
      store(at + i, f(load(from + i)));
    });
  }
}

template <class B>
void look_up(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns, const uint8_t* table) {
  const typename B::Table entries(table);
  map_rows<B>(x, out, rows, columns, [&](typename B::Reg v) { return B::look_up(entries, v); });
}

template <class B>
void requantize(Rows<const uint8_t> x, Rows<uint8_t> out, int64_t rows, int64_t columns, const Operand& operand,
                const Output& output) {
  const OperandOf<B> of(operand);
  const OutputOf<B> to(output);
  const auto requantized = [&](typename B::Reg v) {
    typename B::Floats::Reg y[B::kParts];
    of.steps(v, y);
    return to.value(y);
  };
  constexpr int64_t kEnoughForTable = 2048;
  if (B::kLooksUpFast && rows * columns >= kEnoughForTable) {
    uint8_t table[256];
    for (int i = 0; i < 256; ++i) table[i] = static_cast<uint8_t>(i);
    for (int i = 0; i < 256; i += B::N) B::store(table + i, requantized(B::load(table + i)));
    look_up<B>(x, out, rows, columns, table);
  } else {
    map_rows<B>(x, out, rows, columns, requantized);
  }
}

template <class B>
void look_up_floats(const uint8_t* x, float* out, int64_t n, const float* table) {
  for (int64_t i = 0; i < n; ++i) out[i] = table[x[i]];
}

template <class B, class S>
constexpr FloatKernels<S> float_kernels() {
  return {quantize<B, S>, quantize_transposed<B, S>, dequantize<B, S>};
}

template <class B>
constexpr ElementwiseKernels elementwise_table() {
  static_assert(has_bytes_interface<B>(), "see bytes.h");
  return {
      float_kernels<B, float>(),
      float_kernels<B, Half>(),
      float_kernels<B, BFloat16>(),
      binary<B, Sum>,
      binary<B, Product>,
      requantize<B>,
      transpose<B>,
      look_up<B>,
      look_up_floats<B>,
  };
}

}  // namespace
}  // namespace fastquant
