// A few threads that go through the phases of one long call together: those of parallel.h.
//
// Between phases they meet at a barrier, where they wait actively for some 20 us, the usual
// difference between two of them, and then sleep: a chain beside other busy programs must not burn
// the processor that it waits for.
#ifndef DIFFMIC_CPU_COMMON_TEAM_H_
#define DIFFMIC_CPU_COMMON_TEAM_H_

#include <atomic>
#include <cstdint>

#include "cpu/common/parallel.h"

namespace diffmic::cpu {

class Team {
 public:
  // Calls body(rank) on up to `threads` threads, the caller's being rank 0, and waits for all.
  // body must not throw.
  template <typename Body>
  void Run(int threads, const Body& body) {
    OnThreads(threads, [&](int rank, int size) {
      size_.store(size, std::memory_order_relaxed);  // by each, before it meets another
      body(rank);
    });
  }

  // The next item of this phase that nobody has taken; `count` or more when there is none left.
  std::int64_t Take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Waits until every thread has come here; the last one calls between() while the others wait.
  // Every write before it is seen by everybody after it. Items can be taken anew.
  template <typename Between>
  void Meet(const Between& between) {
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
      Pause();
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  void Meet() {
    Meet([] {});
  }

 private:
  static void Pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<int> size_{1};
  // Apart from each other: every one is written by all threads.
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_TEAM_H_
