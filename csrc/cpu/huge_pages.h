// Where big outputs lie.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastquant {

// Fresh memory costs more in page faults than a kernel takes to fill it, and malloc hands out fresh
// memory whenever it has given much back before, from 32 MiB on each time: ask for huge pages there,
// one fault in place of 512. A system that gives none is none the worse for it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < 2 * static_cast<int64_t>(kPage)) return;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastquant
