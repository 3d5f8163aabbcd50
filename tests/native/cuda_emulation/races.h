// Finds accesses of different threads to the same memory, one of them a write, that nothing orders:
// where a launch has any, the process ends with a message. What orders them is what CUDA says does:
//
// - in a block, a barrier between them; warp operations are none;
// - between blocks, a barrier, a fence and an atomic of one thread, then an atomic on the same
//   memory and a fence of another thread, then a barrier where it is others that go on.
//
// Kernels are compiled with -fsanitize=thread, whose calls come here instead of to its library.
#pragma once

#include <cstddef>

namespace emulation {

#if defined(FASTQUANT_EMULATION_RACES)
void races_launch();                                  // a launch starts: all before is ordered
void races_forget(const void* memory, size_t bytes);  // the memory is somebody else's now
void races_fence();                                   // of the fiber that runs
void races_atomic_begin(const void* memory);          // its accesses until the end are atomic
void races_atomic_end();
#else
inline void races_launch() {}
inline void races_forget(const void*, size_t) {}
inline void races_fence() {}
inline void races_atomic_begin(const void*) {}
inline void races_atomic_end() {}
#endif

}  // namespace emulation
