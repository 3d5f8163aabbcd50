// Building blocks of the kernels: launching them, access to small buffers, 16-byte accesses, fast integer
// division, and reductions over a warp, a block and a grid.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "vec_cuda.cuh"

namespace fastquant::cuda {

// An Array in the form in which it is passed to kernels: without what only error messages need.
struct Buffer {
  Buffer() = default;
  explicit Buffer(const Array& a) : data(a.data), type(a.type) {}

  void* data = nullptr;
  Element type = Element::other;
};

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ------------------------------------------------------------------------------ launching

template <class... Params, class... Args>
void launch(const Launcher& launcher, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            Args&&... args) {
  if (blocks == 0) return;
  check(blocks <= INT_MAX, "x is too large for a grid of CUDA blocks");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = launcher.stream();
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

// Sets a buffer of floating elements to zero.
inline void clear(const Launcher& launcher, const Array& a) {
  if (a.numel == 0) return;
  const size_t bytes = a.type == Element::f64 ? 8 : (a.type == Element::f32 ? 4 : 2);
  check_cuda(cudaMemsetAsync(a.data, 0, bytes * static_cast<size_t>(a.numel), launcher.stream()));
}

// The block's dynamic shared memory, whose size is set at launch.
template <class T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else  // tests/native/cuda_emulation compiles kernels for the CPU
  return static_cast<T*>(emulated_shared_memory());
#endif
}

// ------------------------------------------------------------------------------ buffers

template <class T>
__device__ __noinline__ T read(Buffer b, int64_t i = 0) {
  return with_element(b.type, [&](auto element) {
    return static_cast<T>(number(static_cast<const decltype(element)*>(b.data)[i]));
  });
}

template <class T>
__device__ __noinline__ void write(Buffer b, int64_t i, T value) {
  with_element(b.type, [&](auto element) { assign(static_cast<decltype(element)*>(b.data) + i, value); });
}

__device__ inline bool is_on(Flag flag) {
  switch (flag.data == nullptr ? 0 : flag.bytes) {
    case 0:
      return true;
    case 1:
      return *static_cast<const uint8_t*>(flag.data) != 0;
    case 2:
      return *static_cast<const uint16_t*>(flag.data) != 0;
    case 4:
      return *static_cast<const uint32_t*>(flag.data) != 0;
    default:
      return *static_cast<const uint64_t*>(flag.data) != 0;
  }
}

// --------------------------------------------------------------------- 16-byte accesses

// The elements that one 16-byte access loads or stores. They stay packed in four 32-bit registers: an
// array of 16-bit elements would take a register for each element, twice as many.
template <class S>
class alignas(16) Pack {
 public:
  static constexpr int N = 16 / static_cast<int>(sizeof(S));

  __device__ S at(int j) const {
    S element;
    if constexpr (sizeof(S) == 2) {
      element.bits = static_cast<uint16_t>(words_[j / 2] >> (j % 2 * 16));
    } else {
      memcpy(&element, words_ + j * kWords, sizeof element);
    }
    return element;
  }

  __device__ void put(int j, S element) {
    if constexpr (sizeof(S) == 2) {
      const int shift = j % 2 * 16;
      words_[j / 2] = (words_[j / 2] & ~(0xffffu << shift)) | unsigned{element.bits} << shift;
    } else {
      memcpy(words_ + j * kWords, &element, sizeof element);
    }
  }

 private:
  static constexpr int kWords = static_cast<int>(sizeof(S) / sizeof(unsigned));  // 0 for 16-bit elements

  unsigned words_[4];
};

template <class P>
__device__ P load_whole(const void* from) {
  static_assert(sizeof(P) % 16 == 0, "of whole accesses");
  P pack;
  uint4 words[sizeof(P) / 16];
  for (int w = 0; w < static_cast<int>(sizeof(P) / 16); ++w) words[w] = static_cast<const uint4*>(from)[w];
  memcpy(&pack, words, sizeof pack);
  return pack;
}

template <class S>
__device__ void store_whole(S* to, const Pack<S>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof words);
#ifdef __CUDA_ARCH__
  // The compiler may split an assignment of uint4 into four accesses; this instruction stays whole.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = words;
#endif
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ------------------------------------------------------------------------------ division

// Divides non-negative integers by a fixed divisor. If dividend and divisor fit into 31 bits, it
// multiplies and shifts instead of dividing (Granlund and Montgomery, Division by Invariant Integers
// using Multiplication, 1994).
class Divider {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    if (divisor > kNarrow) return;
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - static_cast<uint64_t>(divisor);
    factor_ = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  }

  FASTQUANT_HD int64_t divisor() const { return divisor_; }

  FASTQUANT_HD int64_t quotient(int64_t n) const {
    if (n > kNarrow || divisor_ > kNarrow) return n / divisor_;
    const uint32_t narrow = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>((uint64_t{narrow} * factor_) >> 32);
    return (high + narrow) >> shift_;
  }

 private:
  static constexpr int64_t kNarrow = INT32_MAX;

  int64_t divisor_ = 1;
  uint32_t factor_ = 1;
  int shift_ = 0;
};

// ---------------------------------------------------------------------------- reductions

// A partial result P has P::nothing(), the result for no elements, and P::both(a, b), the result for the
// elements of a and b together. The order of these combinations depends only on the launch configuration,
// so that sums of floats are reproducible.

template <class P>
__device__ P shuffle_xor(const P& p, int offset) {
  static_assert(sizeof(P) % sizeof(unsigned) == 0, "shuffled word by word");
  unsigned words[sizeof(P) / sizeof(unsigned)];
  memcpy(words, &p, sizeof p);
  for (unsigned& word : words) word = __shfl_xor_sync(kAllLanes, word, offset);
  P result;
  memcpy(&result, words, sizeof result);
  return result;
}

// Combines the values of all lanes of a warp. Must be called by all 32 lanes; each gets the result.
template <class P>
__device__ P over_warp(P p) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) p = P::both(p, shuffle_xor(p, offset));
  return p;
}

// Combines the values of all threads of a block. Must be called by all threads of a block of whole warps;
// each gets the result. `shared` is shared memory for one P per warp. No thread may still be using it for
// something else.
template <class P>
__device__ P over_block(P p, P* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  p = over_warp(p);
  if (lane == 0) shared[warp] = p;
  __syncthreads();
  return over_warp(lane < warps ? shared[lane] : P::nothing());
}

// Returns whether this block is the last of `blocks` blocks to call it, and then resets the ticket to zero,
// where it must have started. Must be called by all threads of a block. What the other blocks wrote before
// their calls is then in the L2 cache, from which read_fresh reads.
//
// One thread acts for its block. The first barrier makes the writes of the block's threads visible to it;
// the fence, which is cumulative, orders all these writes before its atomic. On the way back, the second
// fence and the second barrier make what the other blocks wrote visible to all threads of this block.
__device__ inline bool arrives_last(unsigned* ticket, int64_t blocks, bool* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = atomicAdd(ticket, 1u) == static_cast<unsigned>(blocks - 1);
    if (*shared) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

// Reads past the L1 cache, which may still hold a value from before another block's write.
template <class P>
__device__ P read_fresh(const P* from) {
  static_assert(sizeof(P) % sizeof(unsigned) == 0, "read word by word");
  unsigned words[sizeof(P) / sizeof(unsigned)];
  for (int w = 0; w < static_cast<int>(sizeof(P) / sizeof(unsigned)); ++w) {
    words[w] = __ldcg(reinterpret_cast<const unsigned*>(from) + w);
  }
  P result;
  memcpy(&result, words, sizeof result);
  return result;
}

}  // namespace
}  // namespace fastquant::cuda
