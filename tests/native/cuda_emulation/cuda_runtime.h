// The parts of CUDA C++ that fastquant's kernels use, for a host compiler. See emulation.h.
#pragma once

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulation.h"
#include "races.h"

// ------------------------------------------------------------------------------ language

#define __global__
#define __device__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};

// threadIdx and the like: constants that give the running fiber's value each time they are read.
struct Coordinate {
  unsigned (*now)();
  operator unsigned() const { return now(); }
};

struct Coordinates {
  Coordinate x;
};

constexpr Coordinates threadIdx = {{emulation::thread_index}};
constexpr Coordinates blockIdx = {{emulation::block_index}};
constexpr Coordinates blockDim = {{emulation::block_size}};
constexpr Coordinates gridDim = {{emulation::grid_size}};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void* emulated_shared_memory() { return emulation::shared_memory(); }

// --------------------------------------------------------------------------- intrinsics

inline void __syncthreads() { emulation::sync_block(0); }
inline int __syncthreads_or(int predicate) { return emulation::sync_block(predicate != 0); }
inline void __threadfence() {
  emulation::races_fence();
  emulation::yield();
}

inline int __any_sync(unsigned lanes, int predicate) {
  const uint64_t* posted = emulation::post_to_warp(lanes, predicate != 0);
  for (int lane = 0; lane < 32; ++lane) {
    if (posted[lane] != 0) return 1;
  }
  return 0;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one word");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const uint64_t* posted = emulation::post_to_warp(lanes, word);
  std::memcpy(&value, &posted[(emulation::thread_index() % 32) ^ static_cast<unsigned>(offset)], sizeof value);
  return value;
}

template <class T>
T atomicAdd(T* memory, T value) {
  emulation::yield();
  emulation::races_atomic_begin(memory);
  const T before = *memory;
  *memory = before + value;
  emulation::races_atomic_end();
  return before;
}

template <class T>
T __ldcg(const T* memory) {
  return *memory;
}

// ------------------------------------------------------------------------------ launching

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const std::tuple<std::decay_t<Params>...> parameters(std::forward<Args>(args)...);
  emulation::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                 [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
