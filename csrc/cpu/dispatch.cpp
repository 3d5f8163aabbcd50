#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(FASTQUANT_AVX_VNNI)
#include <cpuid.h>
#elif defined(FASTQUANT_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(FASTQUANT_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(FASTQUANT_AMX)
#include "amx.h"
#include "quantized/matrix_amx.h"
#include "tile_kernels.h"
#endif
#include "kernels.h"
#include "quantized/depthwise_kernels.h"
#include "quantized/elementwise_kernels.h"
#include "quantized/embedding_kernels.h"
#include "quantized/kernels.h"
#include "quantized/matrix_kernels.h"
#include "quantized/norm_kernels.h"
#include "quantized/pooling_kernels.h"
#include "quantized/recurrent_kernels.h"

namespace fastquant {
namespace {

// Tests for features, not processor models. __builtin_cpu_supports also checks that the operating system saves
// the vector registers.
bool always() { return true; }

#if defined(FASTQUANT_X86)
bool has_avx2() {
  __builtin_cpu_init();
  // F16C is not tested, because older compilers cannot: every processor with AVX2 has it.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_vnni_and_vbmi() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

#if defined(FASTQUANT_AMX)
// Every processor with AMX has VBMI.
bool has_avx512_amx() { return has_avx512_vnni_and_vbmi() && amx_is_usable(); }
#endif

#if defined(FASTQUANT_AVX_VNNI)
// By cpuid, because not every compiler that has these instructions can test for them.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}
#endif

#elif defined(FASTQUANT_NEON)
bool has_neon_dot() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernels* kernels;
  QuantizedKernels quantized;
  const TileKernels* tiles = nullptr;
};

// Best first. One may be there twice: first with instructions that not every processor has which it names, and
// that only some kernels use.
const InstructionSet kBuilt[] = {
#if defined(FASTQUANT_X86)
#if defined(FASTQUANT_AMX)
    {"avx512_amx",
     has_avx512_amx,
     &kAvx512Kernels,
     {&kMatrixAvx512Amx, &kDepthwiseAvx512Vnni, &kElementwiseAvx512Vbmi, &kPoolingAvx512, &kNormAvx512,
      &kRecurrentAvx512, &kEmbeddingAvx512},
     &kTileKernelsAmx},
#endif
    {"avx512_vnni",
     has_avx512_vnni_and_vbmi,
     &kAvx512Kernels,
     {&kMatrixAvx512Vnni, &kDepthwiseAvx512Vnni, &kElementwiseAvx512Vbmi, &kPoolingAvx512, &kNormAvx512,
      &kRecurrentAvx512, &kEmbeddingAvx512}},
    {"avx512_vnni",
     has_avx512_vnni,
     &kAvx512Kernels,
     {&kMatrixAvx512Vnni, &kDepthwiseAvx512Vnni, &kElementwiseAvx512, &kPoolingAvx512, &kNormAvx512,
      &kRecurrentAvx512, &kEmbeddingAvx512}},
    {"avx512",
     has_avx512,
     &kAvx512Kernels,
     {&kMatrixAvx512, &kDepthwiseAvx512, &kElementwiseAvx512, &kPoolingAvx512, &kNormAvx512, &kRecurrentAvx512,
      &kEmbeddingAvx512}},
#if defined(FASTQUANT_AVX_VNNI)
    {"avx_vnni",
     has_avx_vnni,
     &kAvx2Kernels,
     {&kMatrixAvxVnni, &kDepthwiseAvxVnni, &kElementwiseAvx2, &kPoolingAvx2, &kNormAvx2, &kRecurrentAvx2,
      &kEmbeddingAvx2}},
#endif
    {"avx2",
     has_avx2,
     &kAvx2Kernels,
     {&kMatrixAvx2, &kDepthwiseAvx2, &kElementwiseAvx2, &kPoolingAvx2, &kNormAvx2, &kRecurrentAvx2,
      &kEmbeddingAvx2}},
#elif defined(FASTQUANT_NEON)
    {"neon_dot",
     has_neon_dot,
     &kNeonKernels,
     {&kMatrixNeonDot, &kDepthwiseNeonDot, &kElementwiseNeon, &kPoolingNeon, &kNormNeon, &kRecurrentNeon,
      &kEmbeddingNeon}},
    {"neon",
     always,
     &kNeonKernels,
     {&kMatrixNeon, &kDepthwiseNeon, &kElementwiseNeon, &kPoolingNeon, &kNormNeon, &kRecurrentNeon,
      &kEmbeddingNeon}},
#endif
    {"scalar",
     always,
     &kScalarKernels,
     {&kMatrixScalar, &kDepthwiseScalar, &kElementwiseScalar, &kPoolingScalar, &kNormScalar, &kRecurrentScalar,
      &kEmbeddingScalar}},
};

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kBuilt) {
    if (std::strcmp(set.name, name) == 0 && set.runs_here()) return &set;
  }
  return nullptr;
}

const InstructionSet* best() {
  const InstructionSet* set = kBuilt;
  while (!set->runs_here()) ++set;  // the last one runs everywhere
  return set;
}

// What is used until set_isa names an instruction set. With AMX, each size of layer then takes the faster of
// two kernels.
const InstructionSet* initial() {
  const InstructionSet* const set = best();
#if defined(FASTQUANT_AMX)
  if (set->quantized.matrix == &kMatrixAvx512Amx) {
    static MatrixKernels either = kMatrixAvx512Amx;
    either.other = &kMatrixAvx512Vnni;
    static InstructionSet measured = *set;
    measured.quantized.matrix = &either;
    return &measured;
  }
#endif
  return set;
}

// The i-th name of the sets that `counts` is true of, or null.
template <class Counts>
const char* name_of_nth(int i, const Counts& counts) {
  const char* before = "";
  for (const InstructionSet& set : kBuilt) {
    if (!counts(set) || std::strcmp(set.name, before) == 0) continue;
    before = set.name;
    if (i-- == 0) return set.name;
  }
  return nullptr;
}

// What is used; null before the first use, so that a set which is named before is the only one looked for.
std::atomic<const InstructionSet*> current{nullptr};

const InstructionSet& selected() {
  const InstructionSet* set = current.load(std::memory_order_acquire);
  if (set != nullptr) return *set;
  const InstructionSet* const found = initial();
  return current.compare_exchange_strong(set, found, std::memory_order_acq_rel) ? *found : *set;
}

}  // namespace

const Kernels& kernels() { return *selected().kernels; }

const QuantizedKernels& quantized_kernels() { return selected().quantized; }

const TileKernels* tile_kernels() { return selected().tiles; }

const char* isa() { return selected().name; }

const char* built_isa(int i) {
  return name_of_nth(i, [](const InstructionSet&) { return true; });
}

const char* usable_isa(int i) {
  return name_of_nth(i, [](const InstructionSet& set) { return set.runs_here(); });
}

bool set_isa(const char* name) {
  const InstructionSet* set = find(name);
  if (set == nullptr) return false;
  current.store(set, std::memory_order_release);
  return true;
}

}  // namespace fastquant
