// Huge pages for large outputs.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastquant {

// Asks for huge pages for a large output. malloc maps new memory for every allocation of 32 MiB or more, and
// its page faults take longer than a kernel takes to fill it. A huge page needs one fault instead of 512. This
// has no effect on systems without huge pages.
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
