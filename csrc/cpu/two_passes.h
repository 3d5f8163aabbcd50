// Two passes over the same elements in one parallel region. Starting threads takes as long as a pass over a
// tensor that the caches hold.
#pragma once

#include <atomic>
#include <exception>
#include <thread>

#include "arrays.h"

namespace fastquant {
namespace {

// How many elements a thread processes at a time: a whole number of mask words, and few enough for all threads
// to end at about the same time.
constexpr int64_t kPassPiece = 32768;

inline int64_t pass_pieces(int64_t n) { return (n + kPassPiece - 1) / kPassPiece; }

// The pieces [0, count), handed out to threads. Each thread has its share of them, and takes pieces of others
// once it has none left, so that a thread that starts late keeps no other waiting.
class SharedPieces {
 public:
  SharedPieces(int64_t count, int64_t threads) : count_(count), taken_(threads) {}

  // Calls f(piece) for all pieces that this thread gets. `backwards`: for those of a share from last to first.
  template <class F>
  void take(int64_t thread, bool backwards, const F& f) {
    const auto threads = static_cast<int64_t>(taken_.size());
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t share = (thread + i) % threads;
      const int64_t first = count_ * share / threads, end = count_ * (share + 1) / threads;
      for (int64_t k; (k = taken_[share].count.fetch_add(1, std::memory_order_relaxed)) < end - first;) {
        f(backwards ? end - 1 - k : first + k);
      }
    }
  }

 private:
  // In a cache line of its own.
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  int64_t count_;
  std::vector<Taken> taken_;
};

// Calls first(piece, begin, end) for all pieces of n elements, then, in one of the threads, between(), and, if
// that returns true, second(begin, end) for all pieces. Throws what between() throws. Threads begin the second
// pass with what they have read last, which is still in their caches.
//
// A thread waits only for pieces that another one is at work on, so it does not matter how many threads there
// really are.
template <class First, class Between, class Second>
void in_two_passes(int64_t n, int64_t threads, const First& first, const Between& between,
                   const Second& second) {
  enum State { kReading, kGoesOn, kEnded };
  const int64_t pieces = pass_pieces(n);
  SharedPieces to_read(pieces, threads), to_write(pieces, threads);
  std::atomic<int64_t> left{pieces};
  std::atomic<State> state{kReading};
  std::exception_ptr error;
  for_pieces(threads, threads, 1, [&](int64_t thread, int64_t, int64_t) {
    to_read.take(thread, false, [&](int64_t piece) {
      first(piece, piece * kPassPiece, std::min((piece + 1) * kPassPiece, n));
      if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      State next = kEnded;
      try {
        if (between()) next = kGoesOn;
      } catch (...) {
        error = std::current_exception();
      }
      state.store(next, std::memory_order_release);
    });
    constexpr int kSpins = 10000;
    for (int spins = 0; state.load(std::memory_order_acquire) == kReading; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
    if (state.load(std::memory_order_acquire) == kEnded) return;
    to_write.take(thread, true,
                  [&](int64_t piece) { second(piece * kPassPiece, std::min((piece + 1) * kPassPiece, n)); });
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace
}  // namespace fastquant
