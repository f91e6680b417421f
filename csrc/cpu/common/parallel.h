// Parallel loops over independent items.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded and runs its own operations
// on. After each operation they spin for some milliseconds: a thread pool of our own would find the
// cores busy, and a call of ten milliseconds between two of PyTorch's would take half as long
// again. Without such a runtime, with more threads than it has, and in a forked child, which has
// none of its threads, threads are started for one call and joined at its end. Starting or waking a
// thread costs some 20 us, so each needs at least `grain` items.
#ifndef DIFFMIC_CPU_COMMON_PARALLEL_H_
#define DIFFMIC_CPU_COMMON_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace diffmic::cpu {

// Hint to the processor in a spin loop.
inline void SpinPause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Declares this process a forked child. Needed only if the module was loaded after the fork.
void Forked();

// Calls body(data, rank, size) concurrently on `size` <= `threads` threads; the caller has rank 0.
// body must not throw.
void OnThreads(int threads, void (*body)(void* data, int rank, int size), void* data);

// The same for a callable of (rank, size).
template <typename Body>
void OnThreads(int threads, const Body& body) {
  OnThreads(
      threads,
      [](void* data, int rank, int size) { (*static_cast<const Body*>(data))(rank, size); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) for contiguous parts of [0, count) on at most `threads` threads, the
// caller among them. Rethrows the exception of the first part that threw.
template <typename Body>
void ParallelFor(std::int64_t count, int threads, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  const std::int64_t most = count / std::max<std::int64_t>(grain, 1);
  const std::int64_t parts = std::clamp<std::int64_t>(most, 1, std::max(threads, 1));
  if (parts == 1) {
    body(std::int64_t{0}, count);
    return;
  }
  const auto begin_of = [&](std::int64_t part) {
    return count / parts * part + std::min(part, count % parts);
  };
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(parts));
  std::atomic<std::int64_t> next = 0;
  // There may be fewer threads than parts.
  OnThreads(static_cast<int>(parts), [&](int, int) noexcept {
    for (std::int64_t part; (part = next++) < parts;) {
      try {
        body(begin_of(part), begin_of(part + 1));
      } catch (...) {
        errors[static_cast<std::size_t>(part)] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Calls body(next) on at most `threads` threads, fewer if `work` (multiply-adds) is small. The
// bodies take items dynamically from the shared counter `next`, so a thread that is preempted takes
// fewer.
template <typename Body>
void Share(double work, int threads, const Body& body) {
  constexpr double kGrain = 2e6;  // some 150 us
  const auto most = static_cast<std::int64_t>(std::min(work / kGrain, 1e6));
  const std::int64_t parts = std::clamp<std::int64_t>(most, 1, std::max(threads, 1));
  std::atomic<std::int64_t> next = 0;
  ParallelFor(parts, static_cast<int>(parts), 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) body(next);
  });
}

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_PARALLEL_H_
