#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace fastquant {
namespace {

// Best first.
const Kernels* const kBuilt[] = {
#if defined(FASTQUANT_X86)
    &kAvx512Kernels,
    &kAvx2Kernels,
#elif defined(FASTQUANT_NEON)
    &kNeonKernels,
#endif
    &kScalarKernels,
};
constexpr int kBuiltCount = sizeof(kBuilt) / sizeof(kBuilt[0]);

// Tests for features, not processor models. __builtin_cpu_supports also checks that the operating system saves
// the vector registers.
bool runs_here(const Kernels* table) {
#if defined(FASTQUANT_X86)
  __builtin_cpu_init();
  if (table == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (table == &kAvx2Kernels) {
    // F16C is not tested, because older compilers cannot: every processor with AVX2 has it.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  (void)table;
  return true;
}

const Kernels* find(const char* name) {
  for (const Kernels* table : kBuilt) {
    if (std::strcmp(table->isa, name) == 0 && runs_here(table)) return table;
  }
  return nullptr;
}

const Kernels* best() {
  for (const Kernels* table : kBuilt) {
    if (runs_here(table)) return table;
  }
  return &kScalarKernels;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const char* isa() { return kernels().isa; }

const char* built_isa(int i) { return i < kBuiltCount ? kBuilt[i]->isa : nullptr; }

const char* usable_isa(int i) {
  for (const Kernels* table : kBuilt) {
    if (runs_here(table) && i-- == 0) return table->isa;
  }
  return nullptr;
}

bool set_isa(const char* name) {
  const Kernels* table = find(name);
  if (table == nullptr) return false;
  current().store(table, std::memory_order_relaxed);
  return true;
}

}  // namespace fastquant
