// Locks for buffers. Several threads may observe with the same module and without the GIL, so each update of a
// statistic (read, change, write) must be atomic.
#pragma once

#include <mutex>

#include "../memory.h"

namespace fastquant {

// Locks the buffer until the result is destroyed.
std::unique_lock<std::mutex> locked(const Array& a);

}  // namespace fastquant
