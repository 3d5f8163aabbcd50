// The matrix kernels for AMX: as multiply in kernels/matrix-inl.h, by tiles of 16 rows and 16 channels.
//
// A step of packed weights for 16 channels is one row of a tile, so weights are loaded as they lie. Rows of
// values are, too, where they are equally spaced: in linear layers, and in convolutions of EvenRows. Other rows
// are copied together, once for all channels. Two tiles of rows are multiplied by two of channels at once, so
// that each tile that is loaded is used twice. While they are, the sums of the tiles before become outputs,
// because that takes as long as a short product, and other units of the processor do it.
//
// Included headers aside, nothing here may be inline and have external linkage: see ../kernels-inl.h.
#include "dot_avx512.h"
#include "kernels/output-inl.h"
#include "matrix_amx.h"
#include "packing.h"
#include "tiles_amx.h"

namespace fastquant {
namespace {

// Bytes of rows that are copied together before they are multiplied: these stay in the L2 cache.
constexpr int64_t kBytesTogether = 131072;

// Tiles of even rows that are multiplied by all channels before the next ones.
constexpr int64_t kMostRowTiles = 256;

constexpr int64_t kChunk = 64;  // bytes that are copied at once

// Rows whose outputs are computed before the products of a tile of steps: more would delay these.
constexpr int64_t kMostBefore = 6;

constexpr int64_t quotient_rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// A part of the steps of all rows: where its values are in each row, and the first step of its weights. Only
// the first `steps` of them belong to it.
struct StepTile {
  int64_t values, weights, steps;
};

// A tile of rows: where its values are. `row` is the place of the first one among all outputs, and `column`
// that in its line: see EvenRows.
struct RowTile {
  const uint8_t* data;
  int64_t row_stride;
  int64_t row, column;
};

// What the tiles of a call have in common.
struct Tiling {
  int64_t rows, steps;  // of a tile
  int64_t line, kept;   // of so many rows, so many have outputs
  const StepTile* step_tiles;
  int64_t step_tile_count;
  const OutputStage* out;

  // How many rows of the sums before become outputs between the loads and the products of a tile of steps, or
  // after its products. Together, so many steps finish two tiles. An even number, because two rows of bytes are
  // computed together.
  int64_t finish_before = 0, finish_after = 0;

  void share_outputs() {
    const int64_t beside = quotient_rounded_up(rows, step_tile_count) * 2;
    (beside <= kMostBefore ? finish_before : finish_after) = beside;
  }
};

// Makes outputs of the sums of some rows, from `row` on, for up to two vectors of channels from `channel` on,
// of which `count` channels exist. sums: without their offsets.
using Finish = void (*)(const int32_t* sums, int64_t rows, int64_t row, int64_t channel, int64_t count,
                        const OutputStage& out);

// Which sums the tile registers 0 to 3, or as much memory, hold: of up to two tiles of rows and two of
// channels.
struct Sums {
  const RowTile* tiles;
  int tile_count = 0, vectors = 0;
  int64_t channel, channels;
  Finish finish;
};

// Sums in memory that are becoming outputs.
struct Stored {
  alignas(64) int32_t data[4 * kTileRows * kLaneChannels];
  Sums sums;
  int tile = 0;
  int64_t next = 0;  // row of the tile
  int64_t row, column;

  bool left() const { return tile < sums.tile_count; }
};

template <int kVectors>
void finish_any(const int32_t* sums, int64_t rows, int64_t row, int64_t channel, int64_t count,
                const OutputStage& out) {
  const auto finish = [&](auto number) FASTQUANT_INLINE_LAMBDA {
    constexpr int kRows = number;
    Avx512Lanes::Ints vectors[kRows * kVectors];
    unrolled<kRows * kVectors>([&](auto i) FASTQUANT_INLINE_LAMBDA {
      const int32_t* const offset = out.offset + channel + i % kVectors * kLaneChannels;
      vectors[i] = Avx512Lanes::add(Avx512Lanes::load(sums + i * kLaneChannels), Avx512Lanes::load(offset));
    });
    finish_rows<Avx512Lanes, kRows, kVectors>(vectors, row, channel, count, out);
    rows -= kRows, row += kRows, sums += kRows * kVectors * kLaneChannels;
  };
  while (rows >= 8) finish(Index<8>());
  while (rows > 0) finish(Index<1>());
}

// The same for bytes, with fewer instructions: four vectors, of several rows, fill one vector of bytes; and
// values that fit an int32 need no upper bound before they are rounded, because what follows saturates.
// kBounded: bytes have other bounds than 0 and 255, or another sign. While it multiplies tiles, the processor
// starts one operation on floats in a cycle, instead of two.
template <int kVectors, bool kBounded>
void finish_bytes(const int32_t* sums, int64_t rows, int64_t row, int64_t channel, int64_t count,
                  const OutputStage& out) {
  constexpr int kRows = 4 / kVectors;
  __m512i offset[kVectors];
  __m512 factor[kVectors], bias[kVectors];
  unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
    const int64_t at = channel + v * kLaneChannels;
    offset[v] = _mm512_loadu_si512(out.offset + at);
    factor[v] = _mm512_loadu_ps(out.factor + at);
    bias[v] = _mm512_loadu_ps(out.bias + at);
  });
  const __m512i zero_point = _mm512_set1_epi16(static_cast<int16_t>(out.zero_point));
  const auto byte = [&](float level) FASTQUANT_INLINE_LAMBDA {
    return _mm512_set1_epi8(static_cast<char>(static_cast<int32_t>(level) + out.zero_point));
  };
  const __m512i low = byte(out.low), high = byte(out.high),
                flip = _mm512_set1_epi8(static_cast<char>(out.flip));
  // Each group of 16 bytes has four of every vector.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const auto these = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  uint8_t* to = static_cast<uint8_t*>(out.data) + row * out.stride + channel;
  for (; rows > 0; rows -= kRows, sums += 4 * kLaneChannels, to += kRows * out.stride) {
    // Of fewer rows, the last one is computed again.
    const auto row_of = [&](int r) FASTQUANT_INLINE_LAMBDA { return r < rows ? r : rows - 1; };
    __m512i x[4];
    unrolled<4>([&](auto i) FASTQUANT_INLINE_LAMBDA {
      constexpr int v = i % kVectors;
      const __m512i sum = _mm512_load_si512(sums + (row_of(i / kVectors) * kVectors + v) * kLaneChannels);
      const __m512 y = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset[v]));
      x[i] = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(y, factor[v]), bias[v]));
    });
    const __m512i words = _mm512_adds_epi16(_mm512_packs_epi32(x[0], x[1]), zero_point);
    const __m512i more = _mm512_adds_epi16(_mm512_packs_epi32(x[2], x[3]), zero_point);
    __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
    if constexpr (kBounded) bytes = _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(bytes, low), high), flip);
    unrolled<kRows>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      uint8_t* const at = to + row_of(r) * out.stride;
      if constexpr (kVectors == 2) {
        _mm256_mask_storeu_epi8(at, these, _mm512_extracti64x4_epi64(bytes, r));
      } else {
        _mm_mask_storeu_epi8(at, static_cast<__mmask16>(these), _mm512_extracti32x4_epi32(bytes, r));
      }
    });
  }
}

// How the outputs of kVectors vectors of channels are computed.
template <int kVectors>
Finish finish_of(const OutputStage& out, int64_t channel) {
  if (bytes_of(out.type) != 1) return finish_any<kVectors>;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = channel + v * kLaneChannels;
    const __m512 factor = _mm512_abs_ps(_mm512_loadu_ps(out.factor + at));
    const __m512 bias = _mm512_abs_ps(_mm512_loadu_ps(out.bias + at));
    const __m512 most = _mm512_add_ps(_mm512_mul_ps(factor, _mm512_set1_ps(0x1p31f)), bias);
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(0x1p30f), _CMP_LE_OQ) != 0xffff) return finish_any<kVectors>;
  }
  const float zero_point = static_cast<float>(out.zero_point);
  const bool whole = out.low + zero_point == 0 && out.high + zero_point == 255 && out.flip == 0;
  return whole ? finish_bytes<kVectors, false> : finish_bytes<kVectors, true>;
}

// The outputs of the next rows, at most `most`.
__attribute__((noinline)) void finish_some(Stored& s, const Tiling& t, int64_t most) {
  const Sums& sums = s.sums;
  if (s.next == 0) s.row = sums.tiles[s.tile].row, s.column = sums.tiles[s.tile].column;
  const int64_t left = t.rows - s.next, left_in_line = t.kept - s.column;
  int64_t count = left < t.line - s.column ? left : t.line - s.column;  // where no outputs are
  if (left_in_line > 0) {
    count = left < left_in_line ? left : left_in_line;
    count = count < most ? count : most;
    sums.finish(s.data + (s.tile * kTileRows + s.next) * sums.vectors * kLaneChannels, count, s.row,
                sums.channel, sums.channels, *t.out);
    s.row += count;
  }
  s.column += count;
  if (s.column == t.line) s.column = 0;
  s.next += count;
  if (s.next == t.rows) s.next = 0, ++s.tile;
}

void finish(Stored& s, const Tiling& t) {
  while (s.left()) finish_some(s, t, kTileRows);
}

template <int kTile, int kVectors>
FASTQUANT_INLINE void store_sums(int32_t* sums) {
  constexpr int kWidth = kVectors * kLaneChannels;
  store_tile<kTile>(sums + kTile / 2 * kTileRows * kWidth + kTile % 2 * kLaneChannels,
                    kWidth * static_cast<int64_t>(sizeof(int32_t)));
}

// The outputs of sums that the tile registers hold.
void finish_registers(Sums& in_registers, Stored& stored, const Tiling& t) {
  finish(stored, t);
  if (in_registers.tile_count == 0) return;
  const bool pair = in_registers.tile_count == 2;
  if (in_registers.vectors == 2) {
    store_sums<0, 2>(stored.data), store_sums<1, 2>(stored.data);
    if (pair) store_sums<2, 2>(stored.data), store_sums<3, 2>(stored.data);
  } else {
    store_sums<0, 1>(stored.data);
    if (pair) store_sums<2, 1>(stored.data);
  }
  stored.sums = in_registers, stored.tile = 0;
  in_registers.tile_count = 0;
  finish(stored, t);
}

// Weights of some channels. weights: their first step; from step to step it is `width` bytes, and the channels
// that are multiplied next are `ahead` bytes further on.
struct Channels {
  const int8_t* weights;
  int64_t width, ahead;
  int64_t first, count;
  Finish finish;
};

// Steps of each tile of weights: [from, to).
struct Steps {
  int64_t from, to;
};

// Computes the sums of kRowTiles tiles of rows for kVectors times 16 channels in registers, and meanwhile the
// outputs of those that the registers held. Each register is stored just before its next sums start: the
// processor then stores the first while it computes the next ones, which it cannot do where it meets all
// stores together, behind the products that these wait for. Of the weights of the next channels, `ahead` are
// fetched. backwards: from the last tile of steps to the first, which finds in the L1 cache what was read last.
template <int kRowTiles, int kVectors>
void multiply_tiles(const Tiling& t, const RowTile* rows, const Channels& c, Steps ahead, bool backwards,
                    Sums& in_registers, Stored& stored) {
  // Registers: sums of the first and second tile of rows, values, weights.
  constexpr int kValues = 4, kWeights = 6;
  if (in_registers.tile_count != kRowTiles || in_registers.vectors != kVectors)
    finish_registers(in_registers, stored, t);
  const bool stores = in_registers.tile_count > 0;
  alignas(64) int8_t filled_up[kTileRows * kVectors * kTileRowBytes];
  // The products of a tile of steps. `finish_before` are the rows that become outputs between its loads and its
  // products, so that loads never wait for the stores of outputs.
  const auto multiply = [&](int64_t k, int64_t finish_before, auto is_first) FASTQUANT_INLINE_LAMBDA {
    const StepTile& tile = t.step_tiles[k];
    const int8_t* from = c.weights + tile.weights * c.width;
    int64_t stride = c.width;
    for (int64_t i = ahead.from; i < ahead.to; ++i) {
      const int8_t* const at = from + c.ahead + i * stride;
      _mm_prefetch(at, _MM_HINT_T1);
      _mm_prefetch(at + kTileRowBytes, _MM_HINT_T1);
    }
    if (tile.steps < t.steps) {
      stride = kVectors * kTileRowBytes;
      for (int64_t i = 0; i < t.steps; ++i) {
        unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
          const int64_t at = v * kTileRowBytes;
          _mm512_store_si512(filled_up + i * stride + at, i < tile.steps
                                                              ? _mm512_loadu_si512(from + i * c.width + at)
                                                              : _mm512_setzero_si512());
        });
      }
      from = filled_up;
    }
    unrolled<kVectors>(
        [&](auto v) FASTQUANT_INLINE_LAMBDA { load_tile<kWeights + v>(from + v * kTileRowBytes, stride); });
    unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      load_tile<kValues + r>(rows[r].data + tile.values, rows[r].row_stride);
    });
    if (finish_before > 0) {
      if (is_first) finish(stored, t);
      if (stored.left()) finish_some(stored, t, finish_before);
    }
    unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
      unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
        if constexpr (is_first) {
          if (stores) store_sums<2 * r + v, kVectors>(stored.data);
          zero_tile<2 * r + v>();
        }
        add_products<2 * r + v, kValues + r, kWeights + v>();
      });
    });
  };
  const int64_t last = t.step_tile_count - 1;
  multiply(backwards ? last : 0, t.finish_before, Index<1>());
  if (stores) stored.sums = in_registers, stored.tile = 0;
  in_registers = {rows, kRowTiles, kVectors, c.first, c.count, c.finish};
  for (int64_t k = 1; k <= last; ++k) {
    if (t.finish_after > 0 && stored.left()) finish_some(stored, t, t.finish_after);
    multiply(backwards ? last - k : k, t.finish_before, Index<0>());
  }
  if (t.finish_after > 0) finish(stored, t);
}

// The outputs of tiles of rows for the channels of the blocks [begin, end). Of 64 channels, all are computed
// before the next rows: the L1 cache then has these rows, and the cache lines of their outputs.
void multiply_rows(const Tiling& t, const RowTile* rows, int64_t row_tiles, const MatrixWeights& weights,
                   int64_t begin, int64_t end) {
  Stored stored;
  Sums in_registers;
  const int64_t pairs = quotient_rounded_up(row_tiles, 2);
  bool backwards = false;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockChannels, in_block = block_channels(weights.channels, block);
    const int64_t width = in_block * kStep;
    const int8_t* const data = weights.data + first * weights.steps * kStep;
    // The steps that each pair fetches of the next block, if its weights lie as these do.
    const bool fetches = block + 1 < end && block_channels(weights.channels, block + 1) == in_block;
    const int64_t steps_ahead = fetches ? quotient_rounded_up(t.steps, pairs) : 0;
    // Twice 32 channels, or 32, or the last 16.
    for (int64_t from = 0, vectors; from < in_block; from += vectors * kLaneChannels) {
      const int64_t lanes = (in_block - from) / kLaneChannels;
      const int64_t parts = lanes == 4 ? 2 : 1;
      vectors = lanes == 3 ? 2 : lanes;
      Channels channels[2];
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t at = from + i * 2 * kLaneChannels, left = weights.channels - first - at;
        const int64_t most = vectors / parts * kLaneChannels;
        channels[i] = {
            data + at * kStep,         width,
            weights.steps * width,     first + at,
            left < most ? left : most, (lanes > 1 ? finish_of<2> : finish_of<1>)(*t.out, first + at)};
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const bool pair = 2 * i + 1 < row_tiles;
        const int64_t ahead = i * steps_ahead, ahead_to = ahead + steps_ahead;
        for (int64_t k = 0; k < parts; ++k, backwards = !backwards) {
          (lanes > 1 ? (pair ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)
                     : (pair ? multiply_tiles<2, 1> : multiply_tiles<1, 1>))(
              t, rows + 2 * i, channels[i % 2 == 0 ? k : parts - 1 - k],
              {ahead, ahead_to < t.steps ? ahead_to : t.steps}, backwards, in_registers, stored);
        }
      }
    }
  }
  finish_registers(in_registers, stored, t);
}

void configure(const Tiling& t) {
  TileShapes shapes;
  for (int tile = 0; tile < 4; ++tile) shapes.set(tile, t.rows, kTileRowBytes);
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, t.rows, t.steps * kStep);
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, t.steps, kTileRowBytes);
  configure_tiles(shapes);
}

// The part of `scratch` from `used` bytes on that begins with a cache line.
uint8_t* aligned(void* after) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(after);
  return reinterpret_cast<uint8_t*>(address + (~address + 1) % kTileRowBytes);
}

// ------------------------------------------------------------------------------------ rows anywhere

// As few tiles as can be, or a few more if these need not be filled up.
int64_t tiles_of_run(int64_t run_steps) {
  const int64_t fewest = quotient_rounded_up(run_steps, kTileRows);
  for (int64_t tiles = fewest; tiles <= fewest + fewest / 3; ++tiles) {
    if (run_steps % tiles == 0) return tiles;
  }
  return fewest;
}

// Copies `bytes` bytes and, behind them, up to 63 of anything.
FASTQUANT_INLINE void copy_bytes(const uint8_t* from, int64_t bytes, uint8_t* to) {
  for (; bytes > kChunk; bytes -= kChunk, from += kChunk, to += kChunk)
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  const uint64_t these = ~uint64_t{0} >> (kChunk - bytes);
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(these, from));
}

// Copies rows from `first` on together, each to row_bytes: runs of segments, each filled up to run_bytes.
void copy_rows(const MatrixRows& a, int64_t first, int64_t rows, int64_t runs, int64_t run_bytes,
               int64_t row_bytes, uint8_t* to) {
  const int64_t segments = a.segments / runs, bytes = a.steps * kStep;
  for (int64_t r = 0; r < rows; ++r, to += row_bytes) {
    const uint8_t* const* p = a.pointers + first + r;
    for (int64_t run = 0; run < runs; ++run) {
      uint8_t* at = to + run * run_bytes;
      for (int64_t s = 0; s < segments; ++s, p += a.stride, at += bytes) copy_bytes(*p + a.offset, bytes, at);
    }
  }
}

// Whether `rows` rows from `first` on, of one segment, are equally spaced.
bool equally_spaced(const MatrixRows& a, int64_t first, int64_t rows) {
  const uint8_t* const* const p = a.pointers + first;
  for (int64_t r = 2; r < rows; ++r) {
    if (p[r] - p[r - 1] != p[1] - p[0]) return false;
  }
  return true;
}

void multiply(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
              const OutputStage& out, void* scratch) {
  if (!fits_tiles(a, weights)) return kMatrixAvx512Vnni.multiply(a, weights, begin, end, out, scratch);
  // Stretches of steps whose weights follow each other; no tile belongs to two of them.
  const int64_t runs = weights.first_steps != nullptr ? a.segments : 1;
  const int64_t run_steps = a.segments / runs * a.steps, run_tiles = tiles_of_run(run_steps);
  const int64_t steps = quotient_rounded_up(run_steps, run_tiles), run_bytes = run_tiles * steps * kStep;
  const int64_t row_tiles = quotient_rounded_up(a.rows, kTileRows);
  StepTile* const step_tiles = static_cast<StepTile*>(scratch);
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = weights.first_steps != nullptr ? weights.first_steps[run] : 0;
    for (int64_t i = 0; i < run_tiles; ++i) {
      const int64_t left = run_steps - i * steps;
      step_tiles[run * run_tiles + i] = {run * run_bytes + i * steps * kStep, first + i * steps,
                                         left < steps ? left : steps};
    }
  }
  const int64_t rows = quotient_rounded_up(a.rows, row_tiles), whole = INT64_MAX;
  Tiling t = {rows, steps, whole, whole, step_tiles, runs * run_tiles, &out};
  t.share_outputs();
  configure(t);
  const int64_t row_bytes = rounded_up(runs * run_bytes, kTileRowBytes) + kTileRowBytes;
  const int64_t tile_bytes = rows * row_bytes;
  const int64_t fitting = kBytesTogether / tile_bytes / 2 * 2, together = fitting < 2 ? 2 : fitting;
  RowTile* const tiles = reinterpret_cast<RowTile*>(aligned(step_tiles + runs * run_tiles));
  uint8_t* const memory = aligned(tiles + together);
  const bool direct = a.segments == 1 && run_steps % steps == 0;
  for (int64_t first = 0; first < row_tiles; first += together) {
    const int64_t left = row_tiles - first, count = left < together ? left : together;
    for (int64_t i = 0; i < count; ++i) {
      // The last tile begins where it is whole: some outputs are then computed twice.
      const int64_t wanted = (first + i) * rows, row = wanted + rows > a.rows ? a.rows - rows : wanted;
      tiles[i] = {memory + i * tile_bytes, row_bytes, row, 0};
      if (direct && equally_spaced(a, row, rows)) {
        tiles[i].data = a.pointers[row] + a.offset;
        tiles[i].row_stride = a.pointers[row + 1] - a.pointers[row];
      } else {
        copy_rows(a, row, rows, runs, run_bytes, row_bytes, memory + i * tile_bytes);
      }
    }
    multiply_rows(t, tiles, count, weights, begin, end);
  }
  release_tiles();
}

// --------------------------------------------------------------------------------------- even rows

void multiply_even(const EvenRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
                   const OutputStage& out) {
  const int64_t steps = even_tile_steps(a.steps), segment_tiles = a.steps / steps;
  StepTile step_tiles[kMostStepTiles];
  for (int64_t i = 0; i < a.segments * segment_tiles; ++i) {
    const int64_t values = i / segment_tiles * a.segment_stride + i % segment_tiles * steps * kStep;
    step_tiles[i] = {values, i * steps, steps};
  }
  const int64_t row_tiles = quotient_rounded_up(a.rows, kTileRows);
  const int64_t rows = quotient_rounded_up(a.rows, row_tiles);
  Tiling t = {rows, steps, a.line, a.kept, step_tiles, a.segments * segment_tiles, &out};
  t.share_outputs();
  configure(t);
  RowTile tiles[kMostRowTiles];
  const int64_t outputs = a.rows / a.line * a.kept + a.rows % a.line;  // of a stretch
  int64_t count = 0;
  for (int64_t i = 0; i < a.stretches * row_tiles; ++i) {
    const int64_t stretch = i / row_tiles, wanted = i % row_tiles * rows;
    const int64_t row = wanted + rows > a.rows ? a.rows - rows : wanted, column = row % a.line;
    tiles[count++] = {a.first + stretch * a.stretch_stride + row * a.row_stride, a.row_stride,
                      stretch * outputs + row / a.line * a.kept + (column < a.kept ? column : a.kept), column};
    if (count == kMostRowTiles || i + 1 == a.stretches * row_tiles) {
      multiply_rows(t, tiles, count, weights, begin, end);
      count = 0;
    }
  }
  release_tiles();
}

// Groups of so few channels would leave most of a tile empty.
void multiply_groups(const MatrixRows& rows, const MatrixWeights& weights, int64_t channels, int64_t begin,
                     int64_t end, const OutputStage& out, void* scratch) {
  kMatrixAvx512Vnni.multiply_groups(rows, weights, channels, begin, end, out, scratch);
}

// For tiles of at least kFewestTileSteps steps.
int64_t scratch_size(int64_t steps, bool in_groups) {
  if (in_groups) return kMatrixAvx512Vnni.scratch_size(steps, in_groups);
  const int64_t step_tiles = steps / kFewestTileSteps + 1;
  const int64_t pair = 2 * kTileRows * (step_tiles * kTileRowBytes + 2 * kTileRowBytes);
  return (pair < kBytesTogether ? kBytesTogether : pair) + step_tiles * static_cast<int64_t>(sizeof(StepTile)) +
         kBytesTogether / kTileBytes * static_cast<int64_t>(sizeof(RowTile)) + 3 * kTileRowBytes;
}

}  // namespace

extern const MatrixKernels kMatrixAvx512Amx = {Avx512Lanes::kValueOffset, scratch_size, multiply,
                                               multiply_groups, multiply_even};

}  // namespace fastquant
