// A loop whose threads take over what slower ones have left.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "../arrays.h"

namespace fastquant {

// How many of the next loops are cut into more parts than there are threads.
inline std::atomic<int> uneven_loops{0};

// Calls f(begin, end) for parts that make up [0, units), in parallel. Each of `threads` threads begins with the
// same stretch in each call, so that it finds in its caches what it has left there.
//
// Cores differ in speed: by their kind, or because other programs use what they share, as with AMX, whose tiles
// then take more than twice as long on one core. So after threads have taken uneven times, stretches are cut
// into `most` parts for a while, and a thread that has none left takes those of others. Not always, because
// each part takes some time of its own.
template <class F>
void for_shared_parts(int64_t units, int64_t threads, int64_t most, const F& f) {
  if (most <= 1) {
    for_pieces(threads, threads, 1,
               [&](int64_t, int64_t from, int64_t to) { f(from * units / threads, to * units / threads); });
    return;
  }
  using Clock = std::chrono::steady_clock;
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
    bool helped;             // its thread took parts of others
    Clock::time_point done;  // when its thread had none left
  };
  constexpr int kLoops = 16;
  const int uneven = uneven_loops.load(std::memory_order_relaxed);
  const int64_t parts = std::min(units, uneven > 0 ? most * threads : threads);
  const std::unique_ptr<Stretch[]> stretches(new Stretch[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    stretches[t].next.store(t * parts / threads, std::memory_order_relaxed);
    stretches[t].end = (t + 1) * parts / threads;
    stretches[t].helped = false;
  }
  const Clock::time_point start = Clock::now();
  for_pieces(threads, threads, 1, [&](int64_t thread, int64_t, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Stretch& s = stretches[(thread + i) % threads];
      for (int64_t part; (part = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;) {
        f(part * units / parts, (part + 1) * units / parts);
        if (i > 0) stretches[thread].helped = true;
      }
      if (i == 0) s.done = Clock::now();
    }
  });
  Clock::time_point first = stretches[0].done, last = first;
  bool helped = false;
  for (int64_t t = 0; t < threads; ++t) {
    first = std::min(first, stretches[t].done), last = std::max(last, stretches[t].done);
    helped = helped || stretches[t].helped;
  }
  if (uneven > 0 ? helped : 4 * (last - first) > last - start) {
    uneven_loops.store(kLoops, std::memory_order_relaxed);
  } else if (uneven > 0) {
    uneven_loops.store(uneven - 1, std::memory_order_relaxed);
  }
}

}  // namespace fastquant
