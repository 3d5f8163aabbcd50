// The tile registers of AMX and their instructions.
//
// As inline assembly rather than intrinsics: those of gcc 12 do not tell the compiler that a load reads memory,
// so it may move the stores that write a tile behind the load.
#pragma once

#include <cstdint>

#include "kernels/unrolled-inl.h"

namespace fastquant {
namespace {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// The operand of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t its_rows, int64_t its_row_bytes) {
    rows[tile] = static_cast<uint8_t>(its_rows);
    row_bytes[tile] = static_cast<uint16_t>(its_row_bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

FASTQUANT_INLINE void configure_tiles(const TileShapes& shapes) {
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

// Without configured tiles, a context switch has no tiles to save.
FASTQUANT_INLINE void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int kTile>
FASTQUANT_INLINE void load_tile(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
FASTQUANT_INLINE void store_tile(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
FASTQUANT_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Adds the products of unsigned values and signed weights to int32 sums, which wrap around.
template <int kSums, int kValues, int kWeights>
FASTQUANT_INLINE void add_products() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kValues), "i"(kWeights));
}

// Adds the products of rows of bf16 and columns of pairs of them to fp32 sums.
template <int kSums, int kRows, int kColumns>
FASTQUANT_INLINE void add_bf16_products() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kColumns));
}

}  // namespace
}  // namespace fastquant
