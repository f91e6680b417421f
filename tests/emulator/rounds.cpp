// Dependent loads: how often the threads of a kernel wait, one wait after the other, for a value
// from the L2 cache or from DRAM. A GPU issues loads without waiting and stalls where a value is
// used; loads that are issued before one of them is used wait together, in one round.
//
// An ordinary load counts as used at once. Kernels state by LoadAhead (cuda/common/loads.cuh) which
// loads they issue together. A value comes from DRAM if the launch has not touched its sector
// before, else from the L2 cache, whose size is not modelled. Threads that meet, at a barrier or in
// a collective operation of a warp, continue after the last of them.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "launch_state.h"
#include "traffic.h"

namespace diffmic::emulator {
namespace {

std::unordered_set<std::uintptr_t> sectors;  // of 32 bytes, in the L2 cache

bool Counts() { return config.mode == Mode::kCounted && running != nullptr; }

// In latencies of the L2 cache, of which DRAM has nearly two.
std::uint64_t Latency(const Rounds& rounds) { return rounds.l2 + std::uint64_t{2} * rounds.dram; }

const Rounds& Later(const Rounds& a, const Rounds& b) { return Latency(a) < Latency(b) ? b : a; }

bool IsInL2(const void* address) {
  return !sectors.insert(reinterpret_cast<std::uintptr_t>(address) / 32).second;
}

void Record(Block& block, const Rounds& loads, std::uint32_t copies) {
  auto& intervals = AllTraffic()[NameOf(launch->kernel)].intervals;
  if (intervals.size() <= block.interval) intervals.resize(block.interval + 1);
  Interval& interval = intervals[block.interval++];
  // The longest chain may be one that did not pass through the last release.
  const Rounds own{loads.l2 - std::min(loads.l2, block.rounds.l2),
                   loads.dram - std::min(loads.dram, block.rounds.dram)};
  interval.loads = Later(interval.loads, own);
  interval.copies = std::max(interval.copies, copies - block.copy_rounds);
  block.rounds = loads;
  block.copy_rounds = copies;
}

}  // namespace

void CountRound(const void* address, bool write) {
  const bool in_l2 = IsInL2(address);
  if (write) return;
  Rounds arrival = running->rounds;
  ++(in_l2 ? arrival.l2 : arrival.dram);
  if (running->ahead) {
    running->arrival = arrival;
  } else {
    running->rounds = arrival;
  }
}

void BeginAhead() {
  if (Counts()) running->ahead = true;
}

Rounds EndAhead() {
  if (!Counts()) return {};
  running->ahead = false;
  return std::exchange(running->arrival, {});
}

void Await(const Rounds& arrival) {
  if (Counts()) running->rounds = Later(running->rounds, arrival);
}

void Prefetch(const void* address) {
  const OwnAccount own;
  OnPrefetch(address, __builtin_return_address(0));
  if (!Counts()) return;
  const auto line = reinterpret_cast<std::uintptr_t>(address) / 128;
  for (std::uintptr_t i = 0; i < 4; ++i) sectors.insert(4 * line + i);
}

void CountCommit(bool empty) {
  if (Counts()) running->group_arrivals.push_back(empty ? 0 : running->copy_rounds + 1);
}

void CountDelivery() {
  if (!Counts()) return;
  running->copy_rounds = std::max(running->copy_rounds, running->group_arrivals.front());
  running->group_arrivals.pop_front();
}

void JoinRounds(Block& block, unsigned first, unsigned past_last, std::uint32_t lanes) {
  if (config.mode != Mode::kCounted) return;
  Rounds last;
  std::uint32_t copies = 0;
  const auto each = [&](auto&& visit) {
    for (unsigned id = first; id < past_last; ++id) {
      if ((lanes >> id % 32 & 1) != 0) visit(block.threads[id]);
    }
  };
  each([&](const Thread& thread) {
    last = Later(last, thread.rounds);
    copies = std::max(copies, thread.copy_rounds);
  });
  each([&](Thread& thread) {
    thread.rounds = last;
    thread.copy_rounds = copies;
  });
}

void JoinRounds(Block& block) {
  JoinRounds(block, 0, static_cast<unsigned>(block.threads.size()), ~std::uint32_t{0});
}

void EndInterval() {
  if (Counts()) Record(*running->block, running->rounds, running->copy_rounds);
}

void EndRounds(Block& block) {
  JoinRounds(block);
  Record(block, block.threads.front().rounds, block.threads.front().copy_rounds);
}

void ForgetRounds() { sectors.clear(); }

}  // namespace diffmic::emulator
