// A race detector for emulated kernels. If two threads access the same memory, at least one of them writes,
// and nothing orders the two accesses, the process aborts with a message. As in CUDA's memory model, two
// accesses are ordered by
//
// - within a block, a barrier between them; warp operations do not count;
// - between blocks, this chain: a barrier in the first block; a fence and then an atomic by one of its
//   threads; an atomic on the same memory and then a fence by a thread of the second block; and a barrier
//   in the second block, if another of its threads makes the second access.
//
// Kernels are compiled with -fsanitize=thread. The functions that it calls for each access are defined in
// races.cpp, in place of ThreadSanitizer's library.
#pragma once

#include <cstddef>

namespace emulation {

#if defined(FASTQUANT_EMULATION_RACES)
void races_launch();                                  // a launch starts after all earlier ones have ended
void races_forget(const void* memory, size_t bytes);  // this memory was freed and may be reused
void races_fence();                                   // the running fiber executes a fence
void races_atomic_begin(const void* memory);          // accesses until races_atomic_end are atomic
void races_atomic_end();
#else
inline void races_launch() {}
inline void races_forget(const void*, size_t) {}
inline void races_fence() {}
inline void races_atomic_begin(const void*) {}
inline void races_atomic_end() {}
#endif

}  // namespace emulation
