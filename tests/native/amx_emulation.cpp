// A processor without AMX raises an invalid-opcode exception at each of its instructions, which arrives here as
// a signal. The handler decodes the instruction, does what it does to tiles in memory, and goes on behind it.
// So the tests run the very machine code that is shipped. It also ends the process where a processor would
// fault: at a configuration that breaks the rules, and at tiles that are not configured, or whose shapes do not
// fit. This file is compiled with the sanitizers of the tests, which so see what tiles read and write.
//
// Where the processor has AMX and the system permits it, nothing is emulated.
#include "amx_emulation.h"

#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// The real test of the processor, by another name: the emulation takes its place.
#define amx_is_usable amx_is_there
#include "cpu/amx.cpp"
#undef amx_is_usable

namespace fastquant {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

[[noreturn]] void fault(const char* why) {
  std::fprintf(stderr, "AMX emulation: %s\n", why);
  std::abort();
}

void require(bool holds, const char* what) {
  if (!holds) fault(what);
}

struct Tile {
  int rows, row_bytes;
  uint8_t bytes[kRows][kRowBytes];

  void clear() { std::memset(bytes, 0, sizeof bytes); }
};

// The tiles of a thread.
struct State {
  bool configured = false;
  uint8_t config[64] = {};
  Tile tiles[kTiles] = {};

  // A thread that keeps tiles makes context switches slower.
  ~State() { require(!configured, "a thread ended that had not released its tiles"); }

  void configure(const uint8_t* from) {
    std::memcpy(config, from, sizeof config);
    release();
    if (config[0] == 0) return;
    require(config[0] == 1, "ldtilecfg: the palette is neither 0 nor 1");
    require(config[1] == 0, "ldtilecfg: start_row is not 0");
    for (int i = 2; i < 16; ++i) require(config[i] == 0, "ldtilecfg: a reserved byte is not 0");
    for (int i = 0; i < 16; ++i) {
      const int row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
      require(row_bytes <= kRowBytes && rows <= kRows, "ldtilecfg: a tile is too large");
      require((row_bytes == 0) == (rows == 0), "ldtilecfg: a tile has rows or columns only");
      require(i < kTiles || rows == 0, "ldtilecfg: palette 1 has 8 tiles");
      if (i < kTiles) tiles[i].rows = rows, tiles[i].row_bytes = row_bytes;
    }
    configured = true;
  }

  void release() {
    configured = false;
    for (Tile& tile : tiles) tile.rows = tile.row_bytes = 0, tile.clear();
  }

  Tile& at(int tile) {
    require(configured && tile < kTiles && tiles[tile].rows > 0, "a tile that is not configured");
    return tiles[tile];
  }
};

thread_local State state;
std::atomic<long> products{0};

void load(Tile& tile, const uint8_t* from, int64_t stride) {
  tile.clear();
  for (int r = 0; r < tile.rows; ++r) {
    for (int i = 0; i < tile.row_bytes; ++i) tile.bytes[r][i] = from[r * stride + i];
  }
}

void store(const Tile& tile, uint8_t* to, int64_t stride) {
  for (int r = 0; r < tile.rows; ++r) {
    for (int i = 0; i < tile.row_bytes; ++i) to[r * stride + i] = tile.bytes[r][i];
  }
}

// Unsigned values times signed weights, in order of rows, steps and columns.
void multiply(Tile& sums, const Tile& values, const Tile& weights) {
  require(&sums != &values && &sums != &weights && &values != &weights, "tdpbusd: tiles are not distinct");
  require(sums.rows == values.rows && sums.row_bytes == weights.row_bytes, "tdpbusd: sums have another shape");
  require(values.row_bytes == 4 * weights.rows, "tdpbusd: values and weights differ in steps");
  require(values.row_bytes % 4 == 0 && sums.row_bytes % 4 == 0, "tdpbusd: rows are not of whole words");
  for (int r = 0; r < sums.rows; ++r) {
    for (int k = 0; k < weights.rows; ++k) {
      for (int column = 0; column < sums.row_bytes; column += 4) {
        uint32_t sum;
        std::memcpy(&sum, &sums.bytes[r][column], sizeof sum);
        for (int i = 0; i < 4; ++i) {
          sum += uint32_t(int(values.bytes[r][4 * k + i]) * int(int8_t(weights.bytes[k][column + i])));
        }
        std::memcpy(&sums.bytes[r][column], &sum, sizeof sum);
      }
    }
  }
  products.fetch_add(1, std::memory_order_relaxed);
}

// A number of bf16, or zero for one that is not normal.
float widened(const uint8_t* bytes) {
  uint16_t upper;
  std::memcpy(&upper, bytes, sizeof upper);
  const uint32_t bits = (upper & 0x7f80) == 0 ? uint32_t{upper & 0x8000u} << 16 : uint32_t{upper} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Not for sums below 2^-126, which a processor makes zero.
void multiply_bf16(Tile& sums, const Tile& rows, const Tile& columns) {
  require(&sums != &rows && &sums != &columns && &rows != &columns, "tdpbf16ps: tiles are not distinct");
  require(sums.rows == rows.rows && sums.row_bytes == columns.row_bytes, "tdpbf16ps: sums have another shape");
  require(rows.row_bytes == 4 * columns.rows, "tdpbf16ps: rows and columns differ in steps");
  require(rows.row_bytes % 4 == 0 && sums.row_bytes % 4 == 0, "tdpbf16ps: rows are not of whole pairs");
  for (int r = 0; r < sums.rows; ++r) {
    for (int column = 0; column < sums.row_bytes; column += 4) {
      float parts[2] = {0, 0}, sum;
      for (int k = 0; k < columns.rows; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float a = widened(&rows.bytes[r][4 * k + 2 * i]),
                      b = widened(&columns.bytes[k][column + 2 * i]);
          parts[i] = std::fma(a, b, parts[i]);
        }
      }
      std::memcpy(&sum, &sums.bytes[r][column], sizeof sum);
      sum += parts[0] + parts[1];
      std::memcpy(&sums.bytes[r][column], &sum, sizeof sum);
    }
  }
  products.fetch_add(1, std::memory_order_relaxed);
}

greg_t register_of(const ucontext_t& context, int number) {
  constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

// An operand in memory: the address without the index, and the index times its scale, which tile loads take as
// the stride.
struct Operand {
  greg_t address, stride;
  int bytes;  // of the instruction, from ModRM on
};

Operand operand(const ucontext_t& context, const uint8_t* modrm, bool index_extended, bool base_extended,
                greg_t instruction) {
  const int mode = *modrm >> 6, rm = *modrm & 7;
  Operand result = {0, 0, 1};
  int base = rm;
  if (rm == 4) {
    const int sib = modrm[1], index = (sib >> 3 & 7) + (index_extended ? 8 : 0);
    base = sib & 7;
    if (index != 4) result.stride = register_of(context, index) << (sib >> 6);
    ++result.bytes;
  }
  const bool without_base = mode == 0 && base == 5;
  if (!without_base) result.address = register_of(context, base + (base_extended ? 8 : 0));
  if (mode == 1) {
    result.address += int8_t(modrm[result.bytes]);
    result.bytes += 1;
  } else if (mode == 2 || without_base) {
    int32_t displacement;
    std::memcpy(&displacement, modrm + result.bytes, sizeof displacement);
    result.bytes += 4;
    result.address += displacement;
    // From the instruction's end on: C4, two more bytes of prefix, the opcode, and what begins with ModRM.
    if (without_base && rm == 5) result.address += instruction + 4 + result.bytes;
  }
  return result;
}

// Does what the instruction does, and returns how many bytes it has; 0 if it is none of AMX.
int execute(const ucontext_t& context, const uint8_t* code) {
  // A VEX prefix of three bytes, opcode map 0F38; W = 0, L = 0.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;
  const int prefix = code[2] & 3, fourth = ~code[2] >> 3 & 15, opcode = code[3], modrm = code[4];
  constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;
  const int reg = (modrm >> 3 & 7) + ((code[1] & 0x80) == 0 ? 8 : 0);
  const bool of_registers = modrm >> 6 == 3;
  const int rm = (modrm & 7) + ((code[1] & 0x20) == 0 ? 8 : 0);
  if (opcode == 0x49 && of_registers && prefix == kNone && modrm == 0xc0) {
    state.release();
    return 5;
  }
  if (opcode == 0x49 && of_registers && prefix == kF2) {
    state.at(reg).clear();
    return 5;
  }
  if (opcode == 0x5e && of_registers && prefix == k66) {
    multiply(state.at(reg), state.at(rm), state.at(fourth));
    return 5;
  }
  if (opcode == 0x5c && of_registers && prefix == kF3) {
    multiply_bf16(state.at(reg), state.at(rm), state.at(fourth));
    return 5;
  }
  if (of_registers || (opcode != 0x49 && opcode != 0x4b)) return 0;
  const greg_t here = reinterpret_cast<greg_t>(code);
  const Operand at = operand(context, code + 4, (code[1] & 0x40) == 0, (code[1] & 0x20) == 0, here);
  uint8_t* const memory = reinterpret_cast<uint8_t*>(at.address);
  if (opcode == 0x49) {
    if (prefix != kNone || reg != 0) return 0;
    state.configure(memory + at.stride);
  } else if (prefix == kF2 || prefix == k66) {  // tileloadd, tileloaddt1
    load(state.at(reg), memory, at.stride);
  } else if (prefix == kF3) {
    store(state.at(reg), memory, at.stride);
  } else {
    return 0;
  }
  return 4 + at.bytes;
}

void on_invalid_opcode(int, siginfo_t*, void* given) {
  auto& context = *static_cast<ucontext_t*>(given);
  greg_t& place = context.uc_mcontext.gregs[REG_RIP];
  const int bytes = execute(context, reinterpret_cast<const uint8_t*>(place));
  if (bytes == 0) signal(SIGILL, SIG_DFL);  // the instruction is repeated, and ends the process
  place += bytes;
}

bool start() {
  if (amx_is_there()) return false;
  struct sigaction action = {};
  action.sa_sigaction = on_invalid_opcode;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  require(sigaction(SIGILL, &action, nullptr) == 0, "no handler can be set up");
  return true;
}

}  // namespace

bool amx_is_emulated() {
  static const bool emulated = start();
  return emulated;
}

bool amx_is_usable() { return amx_is_emulated() || amx_is_there(); }

long emulated_products() { return products; }

}  // namespace fastquant
