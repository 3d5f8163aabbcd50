#include "locks.h"

#include <pthread.h>

#include <array>
#include <new>

namespace fastquant {
namespace {

// All buffers share a few locks, which are chosen by address. A forked child starts with new, unlocked ones,
// because the threads that held the parent's locks do not exist in the child.
using Locks = std::array<std::mutex, 64>;

Locks& locks() {
  static Locks* const all = [] {
    static Locks* const made = new Locks;
    pthread_atfork(nullptr, nullptr, [] { new (made) Locks; });
    return made;
  }();
  return *all;
}

}  // namespace

std::unique_lock<std::mutex> locked(const Array& a) {
  const auto address = reinterpret_cast<uintptr_t>(a.data);
  return std::unique_lock<std::mutex>(locks()[(address >> 6) % std::tuple_size<Locks>::value]);
}

}  // namespace fastquant
