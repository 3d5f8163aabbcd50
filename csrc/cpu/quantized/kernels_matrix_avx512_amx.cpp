// The matrix kernel for AMX: as multiply in kernels/matrix-inl.h, by tiles of 16 rows and 16 channels.
//
// A step of packed weights for 16 channels is one row of a tile, so weights are loaded as they lie. Rows of
// values are, too, where they are equally spaced and their steps fill whole tiles, as in linear layers and 1x1
// convolutions; otherwise they are copied together, once for all channels. Two tiles of rows are multiplied by
// two of channels at once, so that each tile that is loaded is used twice.
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

constexpr int64_t quotient_rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// How rows and steps are cut into tiles of the same size.
struct Tiling {
  // Stretches of steps whose weights follow each other; no tile belongs to two of them.
  int64_t runs, run_steps;
  int64_t run_tiles;  // of each run
  int64_t steps;      // in a tile; the last one of a run may be filled up with zeros
  int64_t row_tiles;  // all of them
  int64_t rows;       // in a tile; the last one may have fewer
  int64_t together;   // tiles of rows for which memory is there: an even number

  Tiling(const MatrixRows& a, const MatrixWeights& weights)
      : runs(weights.first_steps != nullptr ? a.segments : 1),
        run_steps(weights.first_steps != nullptr ? a.steps : a.segments * a.steps),
        run_tiles(tiles_of_run(run_steps)),
        steps(quotient_rounded_up(run_steps, run_tiles)),
        row_tiles(quotient_rounded_up(a.rows, kTileRows)),
        rows(quotient_rounded_up(a.rows, row_tiles)),
        together(tiles_together(tiles())) {}

  int64_t tiles() const { return runs * run_tiles; }  // that a tile of rows consists of
  bool whole() const { return run_steps % steps == 0; }

  // As few as can be, or a few more if these need not be filled up.
  static int64_t tiles_of_run(int64_t run_steps) {
    const int64_t fewest = quotient_rounded_up(run_steps, kTileRows);
    for (int64_t tiles = fewest; tiles <= fewest + fewest / 3; ++tiles) {
      if (run_steps % tiles == 0) return tiles;
    }
    return fewest;
  }

  static int64_t tiles_together(int64_t tiles) {
    const int64_t fitting = kBytesTogether / (tiles * kTileBytes) / 2 * 2;
    return fitting < 2 ? 2 : fitting;
  }
};

// A tile of rows: where its values are. `rows` of them exist.
struct RowTile {
  const uint8_t* data;
  int64_t row_stride, tile_stride;
  int64_t first, rows;
};

// Copies rows from `first` on into tiles, one after the other.
void copy_rows(const MatrixRows& a, const Tiling& t, int64_t first, int64_t rows, uint8_t* tiles) {
  const int64_t row_bytes = t.steps * kStep, segments_of_run = a.segments / t.runs;
  const auto first_bytes = [](int64_t count) { return ~uint64_t{0} >> (kTileRowBytes - count); };
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* to = tiles + r * kTileRowBytes;
    int64_t room = row_bytes;
    for (int64_t s = 0; s < a.segments; ++s) {
      const uint8_t* from = a.pointers[s * a.stride + first + r] + a.offset;
      for (int64_t left = a.steps * kStep; left > 0;) {
        const int64_t count = left < room ? left : room;
        const uint64_t these = first_bytes(count);
        _mm512_mask_storeu_epi8(to, these, _mm512_maskz_loadu_epi8(these, from));
        from += count, to += count, left -= count, room -= count;
        if (room == 0) to += kTileBytes - row_bytes, room = row_bytes;
      }
      if ((s + 1) % segments_of_run == 0 && room < row_bytes) {
        _mm512_mask_storeu_epi8(to, first_bytes(room), _mm512_setzero_si512());
        to += kTileBytes - row_bytes + room, room = row_bytes;
      }
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

RowTile row_tile(const MatrixRows& a, const Tiling& t, int64_t first, uint8_t* memory) {
  const int64_t left = a.rows - first, rows = left < t.rows ? left : t.rows;
  if (a.segments == 1 && t.whole() && rows == t.rows && equally_spaced(a, first, rows)) {
    const int64_t stride = rows > 1 ? a.pointers[first + 1] - a.pointers[first] : 0;
    return {a.pointers[first] + a.offset, stride, t.steps * kStep, first, rows};
  }
  copy_rows(a, t, first, rows, memory);
  return {memory, kTileRowBytes, kTileBytes, first, rows};
}

// The outputs of some rows of sums, which are kVectors vectors wide.
template <int kRows, int kVectors>
void finish_sums(const int32_t* sums, int64_t row, int64_t channel, int64_t count, const OutputStage& out) {
  Avx512Lanes::Ints vectors[kRows * kVectors];
  unrolled<kRows * kVectors>(
      [&](auto i) FASTQUANT_INLINE_LAMBDA { vectors[i] = Avx512Lanes::load(sums + i * Avx512Lanes::N); });
  finish_rows<Avx512Lanes, kRows, kVectors>(vectors, row, channel, count, out);
}

// The outputs of kRowTiles tiles of rows, for kVectors times 16 channels from `channel` on, of which `count`
// exist. weights: the first step of these channels; from step to step it is `width` bytes.
template <int kRowTiles, int kVectors>
void multiply_tiles(const Tiling& t, const RowTile* rows, const int8_t* weights, int64_t width,
                    const int64_t* first_steps, const OutputStage& out, int64_t channel, int64_t count) {
  // Registers: sums of the first and second tile of rows, values, weights.
  constexpr int kValues = 4, kWeights = 6;
  unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      load_tile<2 * r + v>(out.offset + channel + v * kLaneChannels, 0);  // the same in every row
    });
  });
  const uint8_t* values[kRowTiles];
  unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA { values[r] = rows[r].data; });
  alignas(64) int8_t filled_up[kTileRows * kVectors * kTileRowBytes];
  for (int64_t run = 0; run < t.runs; ++run) {
    const int8_t* w = weights + (first_steps != nullptr ? first_steps[run] * width : 0);
    for (int64_t left = t.run_steps; left > 0; left -= t.steps, w += t.steps * width) {
      const int8_t* from = w;
      int64_t stride = width;
      if (left < t.steps) {
        stride = kVectors * kTileRowBytes;
        for (int64_t k = 0; k < t.steps; ++k) {
          unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
            const int64_t at = v * kTileRowBytes;
            _mm512_store_si512(filled_up + k * stride + at,
                               k < left ? _mm512_loadu_si512(w + k * width + at) : _mm512_setzero_si512());
          });
        }
        from = filled_up;
      }
      unrolled<kVectors>(
          [&](auto v) FASTQUANT_INLINE_LAMBDA { load_tile<kWeights + v>(from + v * kTileRowBytes, stride); });
      unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
        load_tile<kValues + r>(values[r], rows[r].row_stride);
        values[r] += rows[r].tile_stride;
        unrolled<kVectors>(
            [&](auto v) FASTQUANT_INLINE_LAMBDA { add_products<2 * r + v, kValues + r, kWeights + v>(); });
      });
    }
  }
  constexpr int64_t kWidth = kVectors * kLaneChannels;
  alignas(64) int32_t sums[kTileRows * kWidth];
  unrolled<kRowTiles>([&](auto r) FASTQUANT_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto v) FASTQUANT_INLINE_LAMBDA {
      store_tile<2 * r + v>(sums + v * kLaneChannels, kWidth * static_cast<int64_t>(sizeof(int32_t)));
    });
    int64_t i = 0;
    for (; i + 4 <= rows[r].rows; i += 4) {
      finish_sums<4, kVectors>(sums + i * kWidth, rows[r].first + i, channel, count, out);
    }
    for (; i < rows[r].rows; ++i) {
      finish_sums<1, kVectors>(sums + i * kWidth, rows[r].first + i, channel, count, out);
    }
  });
}

// The same for all tiles of rows that are there.
template <int kVectors>
void multiply_rows(const Tiling& t, const RowTile* rows, int64_t row_tiles, const int8_t* weights,
                   int64_t width, const int64_t* first_steps, const OutputStage& out, int64_t channel,
                   int64_t count) {
  int64_t i = 0;
  for (; i + 2 <= row_tiles; i += 2) {
    multiply_tiles<2, kVectors>(t, rows + i, weights, width, first_steps, out, channel, count);
  }
  if (i < row_tiles) {
    multiply_tiles<1, kVectors>(t, rows + i, weights, width, first_steps, out, channel, count);
  }
}

void multiply(const MatrixRows& a, const MatrixWeights& weights, int64_t begin, int64_t end,
              const OutputStage& out, void* scratch) {
  if (!fits_tiles(a, weights)) return kMatrixAvx512Vnni.multiply(a, weights, begin, end, out, scratch);
  const Tiling t(a, weights);
  TileShapes shapes;
  for (int tile = 0; tile < 4; ++tile) shapes.set(tile, t.rows, kTileRowBytes);
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, t.rows, t.steps * kStep);
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, t.steps, kTileRowBytes);
  configure_tiles(shapes);
  RowTile* const rows = static_cast<RowTile*>(scratch);
  const uintptr_t after = reinterpret_cast<uintptr_t>(rows + t.together);
  uint8_t* const memory = reinterpret_cast<uint8_t*>(after + (~after + 1) % kTileRowBytes);
  for (int64_t first = 0; first < t.row_tiles; first += t.together) {
    const int64_t left = t.row_tiles - first, count = left < t.together ? left : t.together;
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = row_tile(a, t, (first + i) * t.rows, memory + i * t.tiles() * kTileBytes);
    }
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channel = block * kBlockChannels, width = block_channels(weights.channels, block) * kStep;
      const int8_t* const data = weights.data + channel * weights.steps * kStep;
      for (int64_t c = 0; c * kStep < width; c += 2 * kLaneChannels) {
        const int64_t there = weights.channels - channel - c;
        const bool two = there > kLaneChannels;
        const int64_t most = two ? 2 * kLaneChannels : kLaneChannels;
        (two ? multiply_rows<2> : multiply_rows<1>)(t, rows, count, data + c * kStep, width,
                                                    weights.first_steps, out, channel + c,
                                                    there < most ? there : most);
      }
    }
  }
  release_tiles();
}

// Tiling::together is at least 2; else it is what fits kBytesTogether, of tiles of at least kFewestTileSteps
// steps.
int64_t scratch_size(int64_t steps, bool) {
  const int64_t pair = 2 * (steps / kFewestTileSteps + 1) * kTileBytes;
  const int64_t memory = pair < kBytesTogether ? kBytesTogether : pair;
  return memory + kBytesTogether / kTileBytes * static_cast<int64_t>(sizeof(RowTile)) + kTileRowBytes;
}

}  // namespace

extern const MatrixKernels kMatrixAvx512Amx = {Avx512Lanes::kValueOffset, scratch_size, multiply};

}  // namespace fastquant
