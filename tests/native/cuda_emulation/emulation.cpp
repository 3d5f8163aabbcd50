#include "emulation.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t{256} << 10;
[[maybe_unused]] constexpr size_t kAbandonedBytes = size_t{16} << 10;
constexpr unsigned kBlocksUnderWay = 3;

std::mt19937_64 rng(1);
int64_t launch_count = 0;
bool is_capturing = false;
int multiprocessor_count = 4;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

// ------------------------------------------------------------------------------ contexts

// A suspended fiber's stack and registers.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine = {};
#endif
  unsigned char* stack = nullptr;
  const void* bottom = nullptr;  // this and the following members are for AddressSanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

#if defined(__x86_64__)
// Saves the callee-saved registers and switches stacks. swapcontext would make a system call each time.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

void prepare(Context* c, void (*entry)()) {
  if (c->stack == nullptr) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    c->stack = static_cast<unsigned char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that has ended did not return from its outermost frames, so they are still poisoned.
  __asan_unpoison_memory_region(c->stack + kStackBytes - kAbandonedBytes, kAbandonedBytes);
#endif
  c->bottom = c->stack;
  c->bytes = kStackBytes;
  c->fake_stack = nullptr;
#if defined(__x86_64__)
  // Lays the stack out as if `entry` had just been called, when the stack pointer is 8 below a multiple of
  // 16.
  auto** top = reinterpret_cast<void**>(c->stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  c->stack_pointer = top;
#else
  getcontext(&c->machine);
  c->machine.uc_stack.ss_sp = c->stack;
  c->machine.uc_stack.ss_size = kStackBytes;
  c->machine.uc_link = nullptr;
  makecontext(&c->machine, entry, 0);
#endif
}

// Completes a switch to `c`. Stores the bounds of the stack that was left in `came_from`, unless it is null:
// for the scheduler's stack, only AddressSanitizer knows them.
void arrived(Context* c, [[maybe_unused]] Context* came_from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(c->fake_stack, &bottom, &bytes);
  if (came_from != nullptr) {
    came_from->bottom = bottom;
    came_from->bytes = bytes;
  }
#else
  static_cast<void>(c);
#endif
}

void change(Context* from, Context* to, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake_stack, to->bottom, to->bytes);
#endif
#if defined(__x86_64__)
  emulation_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->machine, &to->machine);
#endif
  arrived(from, nullptr);
}

// ----------------------------------------------------------------------- blocks of fibers

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;
  unsigned thread = 0;
};

// A barrier, of a block or a warp.
struct Meeting {
  std::vector<Fiber*> waiting;
  int any = 0;
  int result[2] = {};  // alternates, because some fibers may read the last result after others have gone on
  uint64_t words[2][kWarp] = {};
  unsigned count = 0;
};

struct Block {
  unsigned index = 0, live = 0;
  std::unique_ptr<unsigned char[]> shared;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
};

Context scheduler;
Fiber* current = nullptr;
std::vector<Fiber*> ready;
const std::function<void()>* running_kernel = nullptr;
unsigned threads_of_block = 0, blocks_of_grid = 0;

void leave_for_scheduler(bool for_good) {
  Fiber* self = current;
  change(&self->context, &scheduler, for_good);
}

void fiber_main() {
  arrived(&current->context, &scheduler);
  (*running_kernel)();
  Block& block = *current->block;
  if (!block.barrier.waiting.empty() || !block.warps[current->thread / kWarp].waiting.empty()) {
    fail("a thread ended while others wait for it");
  }
  --block.live;
  leave_for_scheduler(true);
}

// Waits until `expected` fibers have called it. Returns which of the alternating results this time uses.
template <class Post>
unsigned meet(Meeting* m, unsigned expected, const Post& post) {
  const unsigned parity = m->count % 2;
  post(parity);
  m->waiting.push_back(current);
  if (m->waiting.size() < expected) {
    leave_for_scheduler(false);
    return parity;
  }
  ++m->count;
  m->result[parity] = m->any;
  m->any = 0;
  for (Fiber* f : m->waiting) {
    if (f != current) ready.push_back(f);
  }
  m->waiting.clear();
  return parity;
}

std::unique_ptr<Block> new_block(unsigned index, size_t shared_bytes,
                                 std::vector<std::unique_ptr<Fiber>>* spare) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->live = threads_of_block;
  block->shared.reset(new unsigned char[shared_bytes]);
  for (size_t i = 0; i < shared_bytes; ++i) block->shared[i] = static_cast<unsigned char>(rng());
  block->warps.resize((threads_of_block + kWarp - 1) / kWarp);
  for (unsigned t = 0; t < threads_of_block; ++t) {
    if (spare->empty()) spare->push_back(std::make_unique<Fiber>());
    block->fibers.push_back(std::move(spare->back()));
    spare->pop_back();
    Fiber& f = *block->fibers.back();
    f.block = block.get();
    f.thread = t;
    prepare(&f.context, fiber_main);
    ready.push_back(&f);
  }
  return block;
}

}  // namespace

unsigned thread_index() { return current->thread; }
unsigned block_index() { return current->block->index; }
unsigned block_size() { return threads_of_block; }
unsigned grid_size() { return blocks_of_grid; }
void* shared_memory() { return current->block->shared.get(); }
unsigned barriers_passed() { return current->block->barrier.count; }
bool in_kernel() { return current != nullptr; }

bool is_on_own_stack(const void* address) {
  const unsigned char* stack = current->context.stack;
  return address >= stack && address < stack + kStackBytes;
}

void yield() {
  if (rng() % 4 != 0) return;
  ready.push_back(current);
  leave_for_scheduler(false);
}

int sync_block(int predicate) {
  Block& block = *current->block;
  if (block.live != threads_of_block) fail("a barrier after some threads have ended");
  const unsigned parity =
      meet(&block.barrier, threads_of_block, [&](unsigned) { block.barrier.any |= predicate; });
  return block.barrier.result[parity];
}

const uint64_t* post_to_warp(unsigned lanes, uint64_t word) {
  Meeting& warp = current->block->warps[current->thread / kWarp];
  if (lanes != 0xffffffffu) fail("a warp operation of some lanes only");
  const unsigned lane = current->thread % kWarp;
  const unsigned parity = meet(&warp, kWarp, [&](unsigned p) { warp.words[p][lane] = word; });
  return warp.words[parity];
}

void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<Fiber>> spare;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) fail("no such block");
  if (shared_bytes > 48 * 1024) fail("more shared memory than every device has");
  ++launch_count;
  races_launch();
  running_kernel = &kernel;
  threads_of_block = threads;
  blocks_of_grid = blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), rng);
  std::vector<std::unique_ptr<Block>> under_way;
  while (!order.empty() || !under_way.empty()) {
    while (under_way.size() < kBlocksUnderWay && !order.empty()) {
      under_way.push_back(new_block(order.back(), shared_bytes, &spare));
      order.pop_back();
    }
    if (ready.empty()) fail("deadlock");
    std::swap(ready[rng() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
    Block* block = current->block;
    change(&scheduler, &current->context, false);
    if (block->live > 0) continue;
    const auto finished =
        std::find_if(under_way.begin(), under_way.end(), [&](const auto& b) { return b.get() == block; });
    // The race detector also saw accesses to the words of warp operations. A later block may get this memory
    // as shared memory, so both are forgotten.
    races_forget(block->shared.get(), shared_bytes);
    races_forget(block->warps.data(), block->warps.size() * sizeof(Meeting));
    for (auto& f : block->fibers) spare.push_back(std::move(f));
    under_way.erase(finished);
  }
  current = nullptr;
}

int64_t launches() { return launch_count; }
void set_capturing(bool capturing) { is_capturing = capturing; }
void set_multiprocessors(int count) { multiprocessor_count = count; }
void seed(uint64_t value) { rng.seed(value); }

}  // namespace emulation

// ------------------------------------------------------------------------ the CUDA runtime

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no memory"; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  // Never freed, because the caller (csrc/cuda/workspace.cpp) never frees it either.
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xa5, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 7;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessor_count;
  return cudaSuccess;
}
