// What the tests of whole tensors share: threads, random choices, and counting what failed. A program includes
// it once.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"

namespace fastquant {

inline int64_t threads = 1;
// Whether threads run at the same time, or one after the other, as they do where fewer are free than asked for.
inline bool at_once = true;

int64_t thread_count() { return threads; }

void run_parallel(int64_t count, void (*f)(void* context, int64_t i), void* context) {
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < count; ++i) {
    workers.emplace_back(f, context, i);
    if (!at_once) workers.back().join();
  }
  for (auto& w : workers) {
    if (w.joinable()) w.join();
  }
}

namespace {

std::mt19937_64 rng(17);
int64_t compared = 0;
int64_t failed = 0;

void expect(bool holds, const char* what) {
  ++compared;
  if (!holds && ++failed <= 20) std::printf("failed: %s (isa %s, %ld threads)\n", what, isa(), long(threads));
}

int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }

// Calls f with each instruction set in use that differs from the one before in kernels on floating-point
// values.
template <class F>
void with_floating_isas(const F& f) {
  const Kernels* last = nullptr;
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    set_isa(usable_isa(i));
    if (&kernels() == last) continue;
    last = &kernels();
    f();
  }
}

}  // namespace
}  // namespace fastquant
