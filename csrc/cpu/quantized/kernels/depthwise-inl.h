// Depthwise convolution, over vectors of bytes (../taps_*.h). Everything here is in an anonymous namespace, and
// std:: is not used: see ../../kernels-inl.h.
//
// A vector consists of lanes of 16 bytes, and a block of channels of G groups of lanes: with one group, the
// lanes hold successive channels; with more, each group holds the same channels of another stretch of the row,
// so that layers of few channels, and the channels left over by whole vectors, fill vectors, too.
#pragma once

#include <cstring>

#include "../../vec_scalar.h"
#include "../depthwise_kernels.h"
#include "unrolled-inl.h"

namespace fastquant {
namespace {

// For how many tiles of outputs input columns are interleaved at a time.
constexpr int64_t kTilesHeld = 4;

template <class V>
struct Depthwise {
  using Bytes = typename V::Bytes;
  using Column = typename V::Column;  // one vector of channels, four taps for each
  using Sums = typename V::Sums;
  using Ints = typename V::Ints;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kVectors = 4;        // of sums, for a vector of bytes
  static constexpr int kSums = kLanes * 4;  // elements of such a vector
  static constexpr int kMaxWidth = kLanes * 16;
  static constexpr int kTile = V::kTile;  // outputs that are computed at once

  // What `prepare` writes: in the order of the lanes of each vector, for each of the kVectors.
  struct Parameters {
    int32_t start[kVectors][kSums];  // minus the zero point's share of the sums
    float factor[kVectors][kSums];
    float bias[kVectors][kSums];
  };

  // With a stride of 2, the four taps are those of a square of two rows and two columns, not of four rows: each
  // square of the input is interleaved once, and serves all outputs that read it, in this row and in the next.
  // A kernel of 3 x 3 then takes four products for each channel instead of three, which pays off where they are
  // one instruction.
  static bool in_squares(const DepthwiseGeometry& g) {
    return V::kOneInstruction && g.rows == g.columns && (g.rows == 3 || g.rows == 5) && g.stride == 2 &&
           g.dilation == 1 && bytes_of(g.stage.type) == 1;
  }
  // Of the grid of taps in fours.
  static int64_t quads(const DepthwiseGeometry& g) {
    return in_squares(g) ? (g.rows + 1) / 2 : (g.rows + 3) / 4;
  }
  static int64_t quad_columns(const DepthwiseGeometry& g) { return in_squares(g) ? quads(g) : g.columns; }
  // The weights of tap i of a four; null where there is none.
  static const int8_t* tap(const DepthwiseGeometry& g, int64_t quad, int64_t column, int64_t i) {
    const bool squares = in_squares(g);
    const int64_t r = squares ? quad * 2 + i % 2 : quad * 4 + i, k = squares ? column * 2 + i / 2 : column;
    return r < g.rows && k < g.columns ? g.taps[k * g.rows + r] : nullptr;
  }
  static int64_t weights_size(const DepthwiseGeometry& g) {
    return quads(g) * kVectors * quad_columns(g) * static_cast<int64_t>(sizeof(Column));
  }
  static int64_t prepared_size(const DepthwiseGeometry& g) {
    return (static_cast<int64_t>(sizeof(Parameters)) + weights_size(g) + 63) / 64 * 64;
  }
  static int64_t span(const DepthwiseGeometry& g) {  // input columns that a tile reads
    return (kTile - 1) * g.stride + (g.columns - 1) * g.dilation + 1;
  }
  static int64_t held(const DepthwiseGeometry& g) { return span(g) + (kTilesHeld - 1) * kTile * g.stride; }
  // Squares in a row of them, for `outputs` outputs.
  static int64_t row_of_squares(const DepthwiseGeometry& g, int64_t outputs) {
    return (outputs + kTile - 1) / kTile * kTile + quads(g) - 1;
  }
  static int64_t scratch_size(const DepthwiseGeometry& g) {
    const int64_t columns = in_squares(g) ? row_of_squares(g, g.outputs) : held(g);
    return (columns * quads(g) * kVectors * static_cast<int64_t>(sizeof(Column)) + 63) / 64 * 64;
  }

  static const Column* weights(const void* prepared) {
    return reinterpret_cast<const Column*>(static_cast<const char*>(prepared) + sizeof(Parameters));
  }

  static uint8_t flip(const DepthwiseGeometry& g) {
    return static_cast<uint8_t>(g.input_flip ^ (V::kSigned ? 0x80 : 0));
  }

  // --- preparation of a block

  static void prepare(const DepthwiseGeometry& g, const DepthwiseBlock& block, void* prepared) {
    const int groups = kMaxWidth / block.width;
    if (groups == 1) return prepare_groups<1>(g, block, prepared);
    if constexpr (kLanes >= 2) {
      if (groups == 2) return prepare_groups<2>(g, block, prepared);
    }
    if constexpr (kLanes >= 4) {
      if (groups == 4) return prepare_groups<4>(g, block, prepared);
    }
  }

  template <int G>
  static void prepare_groups(const DepthwiseGeometry& g, const DepthwiseBlock& block, void* prepared) {
    const auto p = static_cast<Parameters*>(prepared);
    Column* const columns = const_cast<Column*>(weights(prepared));
    const int zero_point = g.input_zero_point - (V::kSigned ? 128 : 0);
    Bytes constant[4];
    Column zero_points[kVectors];
    for (Bytes& c : constant) c = V::set1(static_cast<uint8_t>(zero_point));
    V::interleave(constant, zero_points);
    Sums share[kVectors];
    for (Sums& s : share) s = V::zero();
    for (int64_t q = 0; q < quads(g); ++q) {
      for (int64_t k = 0; k < quad_columns(g); ++k) {
        Bytes row[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int8_t* const w = tap(g, q, k, i);
          row[i] = w != nullptr ? V::template load<G>(reinterpret_cast<const uint8_t*>(w) + block.first, 0)
                                : V::set1(0);
        }
        Column w[kVectors];
        V::interleave_weights(row, w);
        for (int j = 0; j < kVectors; ++j) {
          columns[(q * kVectors + j) * quad_columns(g) + k] = w[j];
          share[j] = V::dot(share[j], zero_points[j], w[j]);
        }
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      V::store_sums(p->start[j], V::negative(share[j]));
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t channel = block.first + lane % (kLanes / G) * 16 + j * 4;
        std::memcpy(p->factor[j] + lane * 4, g.stage.factor + channel, 16);
        std::memcpy(p->bias[j] + lane * 4, g.stage.bias + channel, 16);
      }
    }
  }

  // --- interleaving of input columns

  // Interleaves the columns [from, to) of up to four lines into `out`, whose columns are `out_step` apart.
  // Group i takes the columns that lie i * apart further.
  template <int G, int Lines>
  static void interleave_lines(const DepthwiseGeometry& g, const DepthwiseBlock& block,
                               const DepthwiseLine* lines, int64_t apart, int64_t from, int64_t to, Column* out,
                               int64_t out_step) {
    const Bytes flipped = V::set1(flip(g));
    const uint8_t* data[4];
    int64_t step[4], ahead[4];
    int64_t begin = from, end = to;
    bool any_ahead = false;
    for (int r = 0; r < Lines; ++r) {
      data[r] = lines[r].data + block.first;
      step[r] = lines[r].step;
      ahead[r] = lines[r].ahead;
      any_ahead = any_ahead || ahead[r] != 0;
      if (begin < lines[r].begin) begin = lines[r].begin;
      if (end > lines[r].end - (G - 1) * apart) end = lines[r].end - (G - 1) * apart;
    }
    if (block.channels < 16) end = from;  // none may be read whole
    const auto put = [&](Bytes* row) FASTQUANT_INLINE_LAMBDA {
      for (int r = 0; r < Lines; ++r) row[r] = V::exclusive_or(row[r], flipped);
      for (int r = Lines; r < 4; ++r) row[r] = row[Lines - 1];
      V::interleave(row, out);
      out += out_step;
    };
    // Where a line has no such column, or fewer than 16 channels must be read.
    const auto careful = [&](int64_t i) {
      Bytes row[4];
      for (int r = 0; r < Lines; ++r) {
        const uint8_t* source[G];
        for (int k = 0; k < G; ++k) {
          const int64_t column = i + k * apart;
          const bool inside = lines[r].begin <= column && column < lines[r].end;
          source[k] = inside ? data[r] + column * step[r] : g.padding + block.first;
        }
        row[r] = load_groups<G>(block, source);
      }
      put(row);
    };
    int64_t i = from;
    for (; i < to && i < begin; ++i) careful(i);
    const auto simple = [&](auto prefetch) FASTQUANT_INLINE_LAMBDA {
      for (; i < end; ++i) {
        Bytes row[4];
        for (int r = 0; r < Lines; ++r) {
          const uint8_t* const at = data[r] + i * step[r];
          if constexpr (decltype(prefetch)() != 0) {
            if (ahead[r] != 0) {
              for (int k = 0; k < G; ++k) __builtin_prefetch(at + k * apart * step[r] + ahead[r]);
            }
          }
          row[r] = V::template load<G>(at, apart * step[r]);
        }
        put(row);
      }
    };
    if (any_ahead) {
      simple(Index<1>());
    } else {
      simple(Index<0>());
    }
    for (; i < to; ++i) careful(i);
  }

  template <int G>
  static Bytes load_groups(const DepthwiseBlock& block, const uint8_t* const* source) {
    if constexpr (G == kLanes) {
      if (block.channels < 16) {
        uint8_t copies[G][16] = {};
        const uint8_t* pointers[G];
        for (int k = 0; k < G; ++k) {
          std::memcpy(copies[k], source[k], static_cast<size_t>(block.channels));
          pointers[k] = copies[k];
        }
        return V::template load<G>(pointers);
      }
    }
    return V::template load<G>(source);
  }

  template <int G>
  static void interleave_columns(const DepthwiseGeometry& g, const DepthwiseBlock& block,
                                 const DepthwiseLine* lines, int64_t apart, int64_t from, int64_t to,
                                 Column* out) {
    const int64_t all = quads(g), step = all * kVectors;
    for (int64_t q = 0; q < all; ++q, lines += 4, out += kVectors) {
      switch (g.rows - q * 4) {
        case 1:
          interleave_lines<G, 1>(g, block, lines, apart, from, to, out, step);
          break;
        case 2:
          interleave_lines<G, 2>(g, block, lines, apart, from, to, out, step);
          break;
        case 3:
          interleave_lines<G, 3>(g, block, lines, apart, from, to, out, step);
          break;
        default:
          interleave_lines<G, 4>(g, block, lines, apart, from, to, out, step);
      }
    }
  }

  // --- tiles of outputs

  // The sums of vector j of kTile outputs. Where K is not 0, it is the number of columns of taps in fours, Q
  // that of their rows, and neighbouring outputs read neighbouring columns. sources[q]: the first column of row
  // q; from one to the next it is `step`.
  template <int K, int Q>
  static FASTQUANT_INLINE void sum(const DepthwiseGeometry& g, const void* prepared,
                                   const Column* const* sources, int64_t step, int j, Sums* sums) {
    const auto p = static_cast<const Parameters*>(prepared);
    const Sums start = V::load_sums(p->start[j]);
    unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA { sums[x] = start; });
    if constexpr (K > 0) {
      unrolled<Q>([&](auto q) FASTQUANT_INLINE_LAMBDA {
        const Column* const source = sources[q] + j;
        const Column* const w = weights(prepared) + (q * kVectors + j) * K;
        unrolled<kTile - 1 + K>([&](auto i) FASTQUANT_INLINE_LAMBDA {
          const Column column = source[i * step];
          unrolled<K>([&](auto k) FASTQUANT_INLINE_LAMBDA {
            constexpr int kFrom = decltype(i)() - decltype(k)();
            if constexpr (kFrom >= 0 && kFrom < kTile) sums[kFrom] = V::dot(sums[kFrom], column, w[k]);
          });
        });
      });
    } else {
      for (int64_t q = 0; q < quads(g); ++q) {
        const Column* const w = weights(prepared) + (q * kVectors + j) * g.columns;
        for (int64_t k = 0; k < g.columns; ++k) {
          const Column* const source = sources[0] + q * kVectors + j + k * g.dilation * step;
          unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA {
            sums[x] = V::dot(sums[x], source[x * g.stride * step], w[k]);
          });
        }
      }
    }
  }

  // Where a tile of outputs goes. Group k computes the outputs [k * each, (k + 1) * each) of the row.
  struct Target {
    uint8_t* data;  // of output `first` of the row, at the block's first channel
    int64_t first;
    int64_t each;
    int64_t outputs;  // in the row

    // The groups that have an output x of the tile.
    template <int G>
    int groups(int64_t x) const {
      const int64_t left = outputs - first - x;
      if (x >= each - first || left <= 0) return 0;
      return left > (G - 1) * each ? G : static_cast<int>((left + each - 1) / each);
    }
  };

  // Computes kTile outputs and stores those that the row has.
  template <int G, int K, int Q, int kStep>
  static void tile(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                   const Column* const* sources, const Target& target) {
    const auto p = static_cast<const Parameters*>(prepared);
    const auto high = V::set1_float(g.stage.high);
    if (g.output_row != 0) {
      for (int64_t x = 0; x < kTile; ++x) {
        for (int k = 0; k < G; ++k)
          __builtin_prefetch(target.data + (x + k * target.each) * g.output_step + g.output_row, 1);
      }
    }
    const int64_t step = kStep > 0 ? kStep : quads(g) * kVectors;
    const auto half = [&](int j, typename V::Words* words) FASTQUANT_INLINE_LAMBDA {
      Sums sums[kTile];
      Ints a[kTile], b[kTile];
      sum<K, Q>(g, prepared, sources, step, j, sums);
      round(p, j, high, sums, a);
      sum<K, Q>(g, prepared, sources, step, j + 1, sums);
      round(p, j + 1, high, sums, b);
      unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA { words[x] = V::words(a[x], b[x]); });
    };
    typename V::Words words[2][kTile];
    half(0, words[0]);
    half(2, words[1]);
    const auto zero_point = V::set1_word(g.stage.zero_point);
    const Bytes low = V::set1(static_cast<uint8_t>(static_cast<int32_t>(g.stage.low) + g.stage.zero_point));
    const Bytes flipped = V::set1(g.stage.flip);
    unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA {
      const int valid = target.template groups<G>(x);
      if (valid == 0) return;
      const Bytes bytes =
          V::max(V::bytes(V::add(words[0][x], zero_point), V::add(words[1][x], zero_point)), low);
      store<G>(block, V::exclusive_or(bytes, flipped), target.data + x * g.output_step,
               target.each * g.output_step, valid);
    });
  }

  static FASTQUANT_INLINE void round(const Parameters* p, int j, typename V::Floats high, const Sums* sums,
                                     Ints* rounded) {
    const auto factor = V::load_floats(p->factor[j]), bias = V::load_floats(p->bias[j]);
    unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA {
      const auto y = V::add_floats(V::multiply(V::to_floats(sums[x]), factor), bias);
      rounded[x] = V::round(V::min_floats(y, high));
    });
  }

  // Stores the first `valid` groups.
  template <int G>
  static FASTQUANT_INLINE void store(const DepthwiseBlock& block, Bytes bytes, uint8_t* out, int64_t apart,
                                     int valid) {
    if (valid == G && block.channels == block.width) return V::template store<G>(out, apart, bytes);
    alignas(64) uint8_t copy[kMaxWidth];
    V::template store<1>(copy, 0, bytes);
    for (int k = 0; k < valid; ++k)
      std::memcpy(out + k * apart, copy + k * block.width, static_cast<size_t>(block.channels));
  }

  // As `tile`, with outputs in floating point.
  template <int G>
  static void float_tile(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                         const Column* columns, const Target& target) {
    const auto p = static_cast<const Parameters*>(prepared);
    for (int j = 0; j < kVectors; ++j) {
      Sums sums[kTile];
      sum<0, 0>(g, prepared, &columns, quads(g) * kVectors, j, sums);
      int32_t values[kTile][kSums];
      unrolled<kTile>([&](auto x) FASTQUANT_INLINE_LAMBDA { V::store_sums(values[x], sums[x]); });
      for (int64_t x = 0; x < kTile; ++x) {
        const int valid = target.template groups<G>(x);
        for (int i = 0; i < kSums; ++i) {
          const int lane = i / 4, group = lane / (kLanes / G);
          const int channel = lane % (kLanes / G) * 16 + j * 4 + i % 4;
          if (channel >= block.channels || group >= valid) continue;
          float y = static_cast<float>(values[x][i]) * p->factor[j][i] + p->bias[j][i];
          y = y < g.stage.low ? g.stage.low : y;
          y = y > g.stage.high ? g.stage.high : y;
          const int64_t at = (x + group * target.each) * g.output_step + channel;
          if (g.stage.type == OutputType::f32) {
            reinterpret_cast<float*>(target.data)[at] = y;
          } else {
            from_compute(reinterpret_cast<BFloat16*>(target.data) + at, y);
          }
        }
      }
    }
  }

  // --- rows of outputs

  template <int G, int K, int Q>
  static void run_rows(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                       const DepthwiseLine* lines, void* const* outputs, int64_t count, void* scratch) {
    const auto columns = static_cast<Column*>(scratch);
    const int64_t each = (g.outputs + G - 1) / G;
    const int64_t column_size = quads(g) * kVectors, capacity = held(g);
    const int64_t element = bytes_of(g.stage.type);
    for (int64_t row = 0; row < count; ++row, lines += g.rows) {
      const auto out = static_cast<uint8_t*>(outputs[row]) + block.first * element;
      int64_t base = 0, have = 0;  // the columns [base, have) are held
      for (int64_t x = 0; x < each; x += kTile) {
        const int64_t first = x * g.stride, need = first + span(g);
        if (need > have) {
          const int64_t kept = have > first ? have - first : 0;
          std::memmove(columns, columns + (first - base) * column_size,
                       static_cast<size_t>(kept * column_size) * sizeof(Column));
          base = first;
          const int64_t from = first + kept, all = (each - 1) / kTile * kTile * g.stride + span(g);
          have = base + capacity < all ? base + capacity : all;
          interleave_columns<G>(g, block, lines, each * g.stride, from, have, columns + kept * column_size);
        }
        const Column* const source = columns + (first - base) * column_size;
        const Target target = {out + x * g.output_step * element, x, each, g.outputs};
        if (element == 1) {
          const Column* sources[Q > 0 ? Q : 1];
          for (int q = 0; q < (Q > 0 ? Q : 1); ++q) sources[q] = source + q * kVectors;
          tile<G, K, Q, Q * kVectors>(g, block, prepared, sources, target);
        } else {
          float_tile<G>(g, block, prepared, source, target);
        }
      }
    }
  }

  // --- rows of outputs in squares

  // Whether the input of the next row of outputs begins two lines further down.
  static bool follow(const DepthwiseGeometry& g, const DepthwiseLine* lines) {
    const DepthwiseLine* const next = lines + g.rows;
    for (int64_t r = 0; r + 2 < g.rows; ++r) {
      const DepthwiseLine &a = lines[r + 2], &b = next[r];
      if (a.data != b.data || a.step != b.step || a.begin != b.begin || a.end != b.end) return false;
    }
    return true;
  }

  // Two lines as four: their columns that have even numbers, and odd ones.
  struct Halves {
    DepthwiseLine lines[4];
    Halves(const DepthwiseLine& above, const DepthwiseLine& below)
        : lines{of(above, 0), of(below, 0), of(above, 1), of(below, 1)} {}
    static DepthwiseLine of(const DepthwiseLine& line, int64_t odd) {
      return {line.data + odd * line.step, line.step * 2, (line.begin - odd + 1) >> 1,
              (line.end - odd + 1) >> 1, line.ahead};
    }
  };

  // P: squares in each direction that an output reads. Those of all but the last line, which are also the next
  // row's, stay in memory; its last line is interleaved with the one below, which only the next row reads.
  template <int G, int P>
  static void run_squares(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                          const DepthwiseLine* lines, void* const* outputs, int64_t count, void* scratch) {
    const int64_t each = (g.outputs + G - 1) / G, squares = row_of_squares(g, each);
    const auto buffer = [&](int64_t row) {
      return static_cast<Column*>(scratch) + row % P * squares * kVectors;
    };
    const auto interleave = [&](const DepthwiseLine& above, const DepthwiseLine& below, int64_t row) {
      const Halves halves(above, below);
      interleave_lines<G, 4>(g, block, halves.lines, each, 0, squares, buffer(row), kVectors);
    };
    bool followed = false;
    for (int64_t row = 0; row < count; ++row, lines += g.rows) {
      for (int64_t p = followed ? P - 1 : 0; p < P - 1; ++p)
        interleave(lines[2 * p], lines[2 * p + 1], row + p);
      followed = row + 1 < count && follow(g, lines);
      const DepthwiseLine& last = lines[g.rows - 1];
      interleave(last, followed ? lines[g.rows + g.rows - 2] : last, row + P - 1);
      const auto out = static_cast<uint8_t*>(outputs[row]) + block.first;
      for (int64_t x = 0; x < each; x += kTile) {
        const Column* sources[P];
        for (int64_t p = 0; p < P; ++p) sources[p] = buffer(row + p) + x * kVectors;
        tile<G, P, P, kVectors>(g, block, prepared, sources, {out + x * g.output_step, x, each, g.outputs});
      }
    }
  }

  template <int G>
  static void run_groups(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                         const DepthwiseLine* lines, void* const* outputs, int64_t count, void* scratch) {
    auto rows = run_rows<G, 0, 0>;
    // Where a column takes two registers, unrolled loops are up to 1.6 times slower.
    if constexpr (V::kOneInstruction) {
      if (in_squares(g)) {
        rows = g.rows == 3 ? run_squares<G, 2> : run_squares<G, 3>;
      } else if (g.dilation == 1 && g.stride == 1) {
        if (g.columns == 3 && quads(g) == 1) rows = run_rows<G, 3, 1>;
        if (g.columns == 5 && quads(g) == 2) rows = run_rows<G, 5, 2>;
      }
    }
    rows(g, block, prepared, lines, outputs, count, scratch);
  }

  static void run(const DepthwiseGeometry& g, const DepthwiseBlock& block, const void* prepared,
                  const DepthwiseLine* lines, void* const* outputs, int64_t count, void* scratch) {
    const int groups = kMaxWidth / block.width;
    if (groups == 1) return run_groups<1>(g, block, prepared, lines, outputs, count, scratch);
    if constexpr (kLanes >= 2) {
      if (groups == 2) return run_groups<2>(g, block, prepared, lines, outputs, count, scratch);
    }
    if constexpr (kLanes >= 4) {
      if (groups == 4) return run_groups<4>(g, block, prepared, lines, outputs, count, scratch);
    }
  }
};

template <class V>
constexpr DepthwiseKernels depthwise_table() {
  using D = Depthwise<V>;
  return {D::kMaxWidth, D::prepared_size, D::prepare, D::scratch_size, D::run};
}

}  // namespace
}  // namespace fastquant
