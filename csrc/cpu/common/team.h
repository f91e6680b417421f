// A team of threads (those of parallel.h) for calls of many phases with barriers in between. At a
// barrier threads spin for some 20 us, the usual difference between two of them, and then sleep:
// on a busy machine they must not occupy the core that they wait for.
#ifndef DIFFMIC_CPU_COMMON_TEAM_H_
#define DIFFMIC_CPU_COMMON_TEAM_H_

#include <atomic>
#include <cstdint>

#include "cpu/common/parallel.h"

namespace diffmic::cpu {

class Team {
 public:
  // Calls body(rank) on at most `threads` threads and waits for all; the caller has rank 0. body
  // must not throw.
  template <typename Body>
  void Run(int threads, const Body& body) {
    OnThreads(threads, [&](int rank, int size) {
      size_.store(size, std::memory_order_relaxed);  // by each thread, before its first barrier
      body(rank);
    });
  }

  // The next item of this phase. Items are taken dynamically, beyond the last one too.
  std::int64_t Take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Waits for all threads; the last one to arrive calls between() while the others wait. Writes
  // before the barrier are visible to all threads after it. Restarts the items.
  template <typename Between>
  void Barrier(const Between& between) {
    const std::uint32_t phase = phase_.load(std::memory_order_acquire);
    const int size = size_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      between();
      next_.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < 4000; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      SpinPause();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  void Barrier() {
    Barrier([] {});
  }

 private:
  std::atomic<int> size_{1};
  // On separate cache lines: each is written by all threads.
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_TEAM_H_
