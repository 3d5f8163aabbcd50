// Several threads may observe with the same module, each without the GIL: what one of them reads, changes and
// writes back in a buffer has to be one step for the others.
#pragma once

#include <mutex>

#include "../memory.h"

namespace fastquant {

// Locks the buffer until the result is destroyed.
std::unique_lock<std::mutex> locked(const Array& a);

}  // namespace fastquant
