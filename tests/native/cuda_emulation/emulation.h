// Runs CUDA kernels, compiled by a host compiler, on one thread of the host: every thread of a
// block is a fiber with a stack of its own.
//
// Fibers run until they meet a barrier, a warp operation, an atomic or a fence, and go on in
// random order; a few blocks are under way at once, blocks start in random order. So a kernel
// that counts on an order it has not asked for fails here, sooner or later. Shared memory is
// allocated to the byte, for AddressSanitizer, and starts out as rubbish. A barrier or warp
// operation that not all threads reach ends the process with a message.
//
// What it cannot show: the order in which a GPU makes writes visible, and time. Which accesses are
// ordered at all, races.h looks into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// Of the fiber that runs.
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
void* shared_memory();
unsigned barriers_passed();
bool in_kernel();
bool is_on_own_stack(const void* address);

// Lets other fibers run, now and then.
void yield();
// Waits for the block; whether any predicate was true.
int sync_block(int predicate);
// Waits for the warp; the words that its 32 lanes posted.
const uint64_t* post_to_warp(unsigned lanes, uint64_t word);

// A launch, from its start to its end.
void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// How many launches there have been, and the settings of the device.
int64_t launches();
void set_capturing(bool capturing);
void set_multiprocessors(int count);
void seed(uint64_t value);

}  // namespace emulation
