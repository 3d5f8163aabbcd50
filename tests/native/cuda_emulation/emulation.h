// Runs CUDA kernels that a host compiler has compiled, on a single host thread. Every thread of a block is
// a fiber with its own stack.
//
// A fiber runs until it reaches a barrier, a warp operation, an atomic or a fence. Then another fiber,
// chosen at random, goes on. Blocks start in random order, and a few run at the same time. So a kernel that
// depends on an order without synchronizing fails here sooner or later. Shared memory has exactly the size
// of the launch, so that AddressSanitizer finds accesses beyond it, and it starts with random contents. If
// some threads do not reach a barrier or warp operation, the process aborts with a message.
//
// Not emulated are timing and weak memory: every write is visible to all fibers at once. Missing
// synchronization that this would hide is found by races.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// The coordinates and state of the running fiber.
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
void* shared_memory();
unsigned barriers_passed();
bool in_kernel();
bool is_on_own_stack(const void* address);

// Switches to another fiber, with a probability of 1/4.
void yield();
// Waits until all threads of the block have called it. Returns whether any predicate was nonzero.
int sync_block(int predicate);
// Waits until all lanes of the warp have called it. Returns the words of the 32 lanes.
const uint64_t* post_to_warp(unsigned lanes, uint64_t word);

// Runs a kernel with this launch configuration until all its blocks have ended.
void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// The number of launches so far, and settings of the emulated device.
int64_t launches();
void set_capturing(bool capturing);
void set_multiprocessors(int count);
void seed(uint64_t value);

}  // namespace emulation
