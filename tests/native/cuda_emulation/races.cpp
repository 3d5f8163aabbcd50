#include "races.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <unordered_map>

#include "emulation.h"

namespace emulation {
namespace {

// When a thread made an access: `barriers` is how many barriers its block had passed.
struct Moment {
  unsigned block, thread, barriers;
  bool atomic;
};

// The accesses to one piece of memory: the latest write and, since then, the latest reads of two threads.
struct Cell {
  Moment write, reads[2];
  int read_count = 0;
  bool written = false;
};

// For each other block, a number of barriers: its accesses before that barrier are visible.
using Knowledge = std::map<unsigned, unsigned>;

struct Learned {
  Knowledge knowledge;
  // The thread that acquired the knowledge, and its barriers then. The block's other threads have it after
  // their next barrier.
  unsigned thread, barriers;
};

constexpr uintptr_t kCell = 1;  // bytes per cell: the size of the smallest element type, int8

std::unordered_map<uintptr_t, Cell> cells;
std::unordered_map<uintptr_t, Knowledge> published;           // key: the address of an atomic
std::map<unsigned, Learned> known;                            // key: block
std::map<std::pair<unsigned, unsigned>, unsigned> fenced_at;  // key: block and thread; barriers at its fence
std::map<std::pair<unsigned, unsigned>, Knowledge> fetched;   // read by an atomic, known after a fence
bool in_atomic = false;

Moment now() { return {block_index(), thread_index(), barriers_passed(), in_atomic}; }

bool is_ordered(const Moment& before, const Moment& after) {
  if (before.atomic && after.atomic) return true;
  if (before.block == after.block) return before.thread == after.thread || before.barriers < after.barriers;
  const auto own = known.find(after.block);
  if (own == known.end()) return false;
  const Learned& learned = own->second;
  if (after.thread != learned.thread && after.barriers <= learned.barriers) return false;
  const auto found = learned.knowledge.find(before.block);
  return found != learned.knowledge.end() && before.barriers < found->second;
}

[[noreturn]] void fail(const char* what, uintptr_t address, const Moment& a, const Moment& b) {
  std::fprintf(stderr,
               "CUDA emulation: a race at %#zx, %s: block %u thread %u after %u barriers, then block %u "
               "thread %u after %u\n",
               static_cast<size_t>(address), what, a.block, a.thread, a.barriers, b.block, b.thread,
               b.barriers);
  std::abort();
}

void access(const void* memory, size_t bytes, bool writes) {
  if (!in_kernel() || is_on_own_stack(memory)) return;
  const Moment moment = now();
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t address = first / kCell; address <= (first + bytes - 1) / kCell; ++address) {
    Cell& cell = cells[address];
    if (cell.written && !is_ordered(cell.write, moment)) {
      fail(writes ? "write and write" : "write and read", address * kCell, cell.write, moment);
    }
    if (!writes) {
      Moment& latest = cell.reads[0];
      if (cell.read_count > 0 && (latest.block != moment.block || latest.thread != moment.thread)) {
        cell.reads[1] = latest;
        cell.read_count = 2;
      }
      latest = moment;
      if (cell.read_count == 0) cell.read_count = 1;
      continue;
    }
    for (int r = 0; r < cell.read_count; ++r) {
      if (!is_ordered(cell.reads[r], moment)) fail("read and write", address * kCell, cell.reads[r], moment);
    }
    cell.write = moment;
    cell.written = true;
    cell.read_count = 0;
  }
}

void merge(const Knowledge& from, Knowledge* to) {
  for (const auto& [block, barriers] : from) {
    unsigned& mine = (*to)[block];
    if (barriers > mine) mine = barriers;
  }
}

}  // namespace

void races_launch() {
  cells.clear();
  published.clear();
  known.clear();
  fenced_at.clear();
  fetched.clear();
}

void races_forget(const void* memory, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t address = first / kCell; address <= (first + bytes) / kCell; ++address) cells.erase(address);
}

void races_fence() {
  const std::pair<unsigned, unsigned> self = {block_index(), thread_index()};
  fenced_at[self] = barriers_passed();
  const auto found = fetched.find(self);
  if (found == fetched.end()) return;
  Learned& learned = known[self.first];
  merge(found->second, &learned.knowledge);
  learned.thread = self.second;
  learned.barriers = barriers_passed();
  fetched.erase(found);
}

void races_atomic_begin(const void* memory) {
  in_atomic = true;
  const std::pair<unsigned, unsigned> self = {block_index(), thread_index()};
  Knowledge& here = published[reinterpret_cast<uintptr_t>(memory)];
  merge(here, &fetched[self]);
  const auto fence = fenced_at.find(self);
  if (fence == fenced_at.end()) return;
  unsigned& mine = here[self.first];
  if (fence->second > mine) mine = fence->second;
  const auto own = known.find(self.first);
  if (own != known.end()) merge(own->second.knowledge, &here);
}

void races_atomic_end() { in_atomic = false; }

}  // namespace emulation

// The functions that code compiled with -fsanitize=thread calls.
#define FASTQUANT_ACCESSES(bytes)                                                               \
  extern "C" void __tsan_read##bytes(void* p) { emulation::access(p, bytes, false); }           \
  extern "C" void __tsan_write##bytes(void* p) { emulation::access(p, bytes, true); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { emulation::access(p, bytes, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { emulation::access(p, bytes, true); }
FASTQUANT_ACCESSES(1)
FASTQUANT_ACCESSES(2)
FASTQUANT_ACCESSES(4)
FASTQUANT_ACCESSES(8)
FASTQUANT_ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_vptr_update(void**, void*) {}
