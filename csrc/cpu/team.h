// A few threads that go through the phases of one long call together.
//
// They are started by the call and joined at its end: no pool outlives it. Between phases they meet
// at a barrier, where they wait actively for some 20 us, the usual difference between two of them,
// and then sleep: a chain beside other busy programs must not burn the processor that it waits for.
#ifndef DIFFMIC_CPU_TEAM_H_
#define DIFFMIC_CPU_TEAM_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace diffmic::cpu {

class Team {
 public:
  // Calls body(rank) on up to `threads` threads, the caller's being rank 0, and waits for all.
  // body must not throw.
  template <typename Body>
  void Run(int threads, const Body& body) {
    std::vector<std::thread> workers;
    workers.reserve(static_cast<std::size_t>(threads > 1 ? threads - 1 : 0));
    gate_.store(0);
    try {
      for (int rank = 1; rank < threads; ++rank) {
        workers.emplace_back([this, rank, &body] {
          gate_.wait(0);  // the size of the team is known only when all are started
          body(rank);
        });
      }
    } catch (const std::exception&) {
      // The system gives no further thread, or no memory for one: those there are do the work.
    }
    size_ = static_cast<int>(workers.size()) + 1;
    gate_.store(1);
    gate_.notify_all();
    body(0);
    for (std::thread& worker : workers) worker.join();
  }

  // The next item of this phase that nobody has taken; `count` or more when there is none left.
  std::int64_t Take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Waits until every thread has come here; the last one calls between() while the others wait.
  // Every write before it is seen by everybody after it. Items can be taken anew.
  template <typename Between>
  void Meet(const Between& between) {
    const std::uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
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

  int size_ = 1;
  std::atomic<int> gate_{0};
  // Apart from each other: every one is written by all threads.
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_TEAM_H_
