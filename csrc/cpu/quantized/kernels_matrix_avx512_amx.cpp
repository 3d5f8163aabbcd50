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
};

// Sums of up to two tiles of rows and two of channels that are still to become outputs.
struct Sums {
  int32_t* data;
  const RowTile* tiles;
  int tile_count = 0, tile = 0;
  int vectors;
  int64_t channel, channels;
  int64_t next = 0;  // row of the tile
  int64_t row, column;

  bool left() const { return tile < tile_count; }
};

template <int kRows, int kVectors>
void finish_sums(const int32_t* sums, int64_t row, int64_t channel, int64_t count, const OutputStage& out) {
  Avx512Lanes::Ints vectors[kRows * kVectors];
  unrolled<kRows * kVectors>(
      [&](auto i) FASTQUANT_INLINE_LAMBDA { vectors[i] = Avx512Lanes::load(sums + i * Avx512Lanes::N); });
  finish_rows<Avx512Lanes, kRows, kVectors>(vectors, row, channel, count, out);
}

// Rows whose sums become outputs at once.
constexpr int64_t kMostFinished = 8;

// The outputs of the next rows.
__attribute__((noinline)) void finish_some(Sums& s, const Tiling& t) {
  if (s.next == 0) s.row = s.tiles[s.tile].row, s.column = s.tiles[s.tile].column;
  const int64_t left = t.rows - s.next, left_in_line = t.kept - s.column;
  int64_t count = left < t.line - s.column ? left : t.line - s.column;  // where no outputs are
  if (left_in_line > 0) {
    count = left < left_in_line ? left : left_in_line;
    const int64_t width = s.vectors * kLaneChannels;
    const int32_t* const sums = s.data + (s.tile * kTileRows + s.next) * width;
    if (count >= kMostFinished) {
      count = kMostFinished;
      (s.vectors == 2 ? finish_sums<kMostFinished, 2> : finish_sums<kMostFinished, 1>)(sums, s.row, s.channel,
                                                                                       s.channels, *t.out);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        (s.vectors == 2 ? finish_sums<1, 2> : finish_sums<1, 1>)(sums + i * width, s.row + i, s.channel,
                                                                 s.channels, *t.out);
      }
    }
    s.row += count;
  }
  s.column += count;
  if (s.column == t.line) s.column = 0;
  s.next += count;
  if (s.next == t.rows) s.next = 0, ++s.tile;
}

void finish(Sums& s, const Tiling& t) {
  while (s.left()) finish_some(s, t);
}

// Weights of some channels. weights: their first step; from step to step it is `width` bytes, and the channels
// that are multiplied next are `ahead` bytes further on.
struct Channels {
  const int8_t* weights;
  int64_t width, ahead;
  int64_t first, count;
};

// The sums of kRowTiles tiles of rows for kVectors times 16 channels, and meanwhile the outputs of the sums
// before. Of the weights of the next channels, it fetches the part-th of `parts` parts.
template <int kRowTiles, int kVectors>
void multiply_tiles(const Tiling& t, const RowTile* rows, const Channels& c, int64_t part, int64_t parts,
                    int32_t* sums, Sums& before) {
  // Registers: sums of the first and second tile of rows, values, weights.
  constexpr int kValues = 4, kWeights = 6;
  unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      load_tile<2 * r + v>(t.out->offset + c.first + v * kLaneChannels, 0);  // the same in every row
    });
  });
  const int64_t at_once =
      quotient_rounded_up(before.tile_count * quotient_rounded_up(t.rows, kMostFinished), t.step_tile_count);
  const int64_t ahead_from = part * t.steps / parts;
  const int64_t ahead_to = (part + 1) * t.steps / parts;
  alignas(64) int8_t filled_up[kTileRows * kVectors * kTileRowBytes];
  for (int64_t k = 0; k < t.step_tile_count; ++k) {
    const StepTile& tile = t.step_tiles[k];
    const int8_t* from = c.weights + tile.weights * c.width;
    int64_t stride = c.width;
    for (int64_t i = ahead_from; i < ahead_to; ++i) {
      const int8_t* const ahead = from + c.ahead + i * stride;
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + kTileRowBytes, _MM_HINT_T1);
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
      unrolled<kVectors>([&](auto v)
                             FASTQUANT_INLINE_LAMBDA { add_products<2 * r + v, kValues + r, kWeights + v>(); });
    });
    for (int64_t i = 0; i < at_once && before.left(); ++i) finish_some(before, t);
  }
  finish(before, t);
  constexpr int64_t kWidth = kVectors * kLaneChannels;
  unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      store_tile<2 * r + v>(sums + r * kTileRows * kWidth + v * kLaneChannels,
                            kWidth * static_cast<int64_t>(sizeof(int32_t)));
    });
  });
  before.data = sums, before.tiles = rows, before.tile_count = kRowTiles, before.tile = 0, before.next = 0;
  before.vectors = kVectors, before.channel = c.first, before.channels = c.count;
}

// The outputs of tiles of rows for the channels of the blocks [begin, end).
void multiply_rows(const Tiling& t, const RowTile* rows, int64_t row_tiles, const MatrixWeights& weights,
                   int64_t begin, int64_t end) {
  alignas(64) int32_t memory[2][4 * kTileRows * kLaneChannels];
  int turn = 0;
  Sums before;
  const int64_t pairs = quotient_rounded_up(row_tiles, 2);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockChannels, width = block_channels(weights.channels, block) * kStep;
    const int8_t* const data = weights.data + first * weights.steps * kStep;
    for (int64_t at = 0; at * kStep < width; at += 2 * kLaneChannels) {
      const int64_t left = weights.channels - first - at;
      const bool two = left > kLaneChannels;
      const int64_t most = two ? 2 * kLaneChannels : kLaneChannels;
      const bool last = (at + 2 * kLaneChannels) * kStep >= width;
      const int64_t ahead = last ? weights.steps * width - at * kStep : 2 * kLaneChannels * kStep;
      const Channels channels = {data + at * kStep, width, ahead, first + at, left < most ? left : most};
      for (int64_t i = 0; i < pairs; ++i, turn ^= 1) {
        const bool pair = 2 * i + 1 < row_tiles;
        (two ? (pair ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)
             : (pair ? multiply_tiles<2, 1> : multiply_tiles<1, 1>))(t, rows + 2 * i, channels, i, pairs,
                                                                     memory[turn], before);
      }
    }
  }
  finish(before, t);
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
  const Tiling t = {rows, steps, whole, whole, step_tiles, runs * run_tiles, &out};
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
  const Tiling t = {rows, steps, a.line, a.kept, step_tiles, a.segments * segment_tiles, &out};
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
