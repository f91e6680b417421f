// Loops over independent items on a few threads.
//
// Threads are started for one call and joined at its end: nothing spins, nothing survives a call
// (so a forked data loader finds nothing to trip over), and no pool competes with the caller's own.
// Starting one costs some 20 us, so a thread is only started for `grain` items or more.
#ifndef DIFFMIC_CPU_PARALLEL_H_
#define DIFFMIC_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace diffmic::cpu {

// Calls body(begin, end) for contiguous parts of [0, count), each item once, on at most `threads`
// threads, the caller's among them. Rethrows the first part's exception, in the order of the parts.
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
  const auto run = [&](std::int64_t part) noexcept {
    try {
      body(begin_of(part), begin_of(part + 1));
    } catch (...) {
      errors[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) workers.emplace_back(run, started);
  } catch (const std::exception&) {
    // The system gives no further thread, or no memory for one: the parts left over are done here.
  }
  run(0);
  for (std::int64_t part = started; part < parts; ++part) run(part);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Calls body() on at most `threads` threads, fewer where `work` (multiply-adds) does not pay for
// one. The bodies share out the items among themselves, by the counter that each is given, so that
// a thread which other work of the machine holds up takes fewer.
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

#endif  // DIFFMIC_CPU_PARALLEL_H_
