// The happens-before relation, by vector clocks. Barriers order the threads of a block, __syncwarp
// those of a warp; between blocks, a release orders its thread's past before an acquire. Of another
// block a thread stores only the number of releases that it has acquired, which keeps clocks short.
#include <algorithm>
#include <unordered_map>

#include "launch_state.h"

namespace diffmic::emulator {
namespace {

struct Variable {
  std::vector<std::uint32_t> releases;
  std::uint64_t version = 0;
};
std::unordered_map<const void*, Variable> variables;

// A thread's clocks of its own block, including itself and its warp.
std::vector<Clock> KnownThreads(const Thread& thread) {
  std::vector<Clock> known = thread.view->threads;
  const unsigned first = thread.id / 32 * 32;
  for (unsigned lane = 0; lane < 32 && first + lane < known.size(); ++lane) {
    known[first + lane] = std::max(known[first + lane], thread.warp[lane]);
  }
  known[thread.id] = thread.clock;
  return known;
}

template <typename T>
void JoinInto(std::vector<T>& into, const std::vector<T>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void ReleaseView(const void* address, Block& block, std::vector<Clock> known,
                 const std::vector<std::uint32_t>& others) {
  auto released = std::make_shared<View>();
  released->threads = std::move(known);
  if (!block.released.empty()) JoinInto(released->threads, block.released.back()->threads);
  block.released.push_back(released);
  Variable& variable = variables[address];
  JoinInto(variable.releases, others);
  if (variable.releases.size() <= block.number) variable.releases.resize(block.number + 1);
  variable.releases[block.number] = static_cast<std::uint32_t>(block.released.size());
  ++variable.version;
}

}  // namespace

bool HappenedBefore(unsigned block, unsigned thread, Clock clock) {
  const Thread& self = *running;
  if (block == self.block->number) {
    if (thread == self.id) return true;
    if (thread / 32 == self.id / 32 && self.warp[thread % 32] >= clock) return true;
    return self.view->threads[thread] >= clock;
  }
  const auto& releases = self.view->releases;
  if (block >= releases.size() || releases[block] == 0) return false;
  return launch->blocks[block].released[releases[block] - 1]->threads[thread] >= clock;
}

void JoinWarp(Block& block, unsigned warp, std::uint32_t mask) {
  Clock known[32] = {};
  const Thread* first = nullptr;
  bool one_view = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Thread& thread = block.threads[warp * 32 + lane];
    if (first == nullptr) first = &thread;
    one_view = one_view && thread.view == first->view;
    for (unsigned i = 0; i < 32; ++i) known[i] = std::max(known[i], thread.warp[i]);
    known[lane] = std::max(known[lane], thread.clock);
  }
  ViewPointer view = first->view;
  if (!one_view) {
    auto joined = std::make_shared<View>(*first->view);
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      const View& other = *block.threads[warp * 32 + lane].view;
      JoinInto(joined->threads, other.threads);
      JoinInto(joined->releases, other.releases);
    }
    view = joined;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& thread = block.threads[warp * 32 + lane];
    std::copy(std::begin(known), std::end(known), thread.warp);
    thread.view = view;
    ++thread.clock;
  }
}

void JoinBlock(Block& block) {
  auto joined = std::make_shared<View>();
  joined->threads.assign(block.threads.size(), 0);
  const View* last = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.view.get() != last) {
      last = thread.view.get();
      JoinInto(joined->threads, last->threads);
      JoinInto(joined->releases, last->releases);
    }
    if (thread.waits == Waits::kBlock) {
      joined->threads[thread.id] = std::max(joined->threads[thread.id], thread.clock);
    }
  }
  for (Thread& thread : block.threads) {
    if (thread.waits != Waits::kBlock) continue;
    thread.view = joined;
    ++thread.clock;
  }
}

void Release(const void* address) {
  Thread& self = *running;
  ReleaseView(address, *self.block, KnownThreads(self), self.view->releases);
  ++self.clock;
}

void Acquire(const void* address) {
  Thread& self = *running;
  const auto found = variables.find(address);
  if (found == variables.end()) return;
  const Variable& variable = found->second;
  if (self.acquired == address && self.acquired_version == variable.version) return;
  self.acquired = address;
  self.acquired_version = variable.version;
  auto view = std::make_shared<View>(*self.view);
  JoinInto(view->releases, variable.releases);
  const unsigned own = self.block->number;
  if (own < view->releases.size() && view->releases[own] > 0) {
    JoinInto(view->threads, self.block->released[view->releases[own] - 1]->threads);
  }
  self.view = view;
}

void Fence() {
  const OwnAccount own;
  Thread& self = *running;
  for (const void* address : self.read_atomics) Acquire(address);
  self.read_atomics.clear();
  auto view = std::make_shared<View>();
  view->threads = KnownThreads(self);
  view->releases = self.view->releases;
  self.fenced = view;
  ++self.clock;
}

void Atomic(void* address, std::size_t size, Order order) {
  if (running == nullptr) return;
  const OwnAccount own;
  if (order == Order::kRelaxed) OnAtomic(address, size, __builtin_return_address(0));
  Yield();
  Thread& self = *running;
  if (order == Order::kRelease) Release(address);
  if (order == Order::kAcquire) Acquire(address);
  if (order != Order::kRelaxed) return;
  // After a fence a relaxed atomic releases the fence's view; the next fence acquires what it
  // reads.
  if (self.fenced != nullptr) {
    ReleaseView(address, *self.block, self.fenced->threads, self.fenced->releases);
  }
  if (self.read_atomics.size() > 64) self.read_atomics.clear();
  self.read_atomics.push_back(address);
}

void ForgetOrder() { variables.clear(); }

}  // namespace diffmic::emulator
