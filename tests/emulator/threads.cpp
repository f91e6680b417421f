// Operations of a kernel's thread: barriers, warp collectives and asynchronous copies.
#include <algorithm>
#include <cstring>

#include "fibers.h"
#include "launch_state.h"

namespace diffmic::emulator {
namespace {

void Wait(Waits what, const char* name, const void* place) {
  running->waits = what;
  running->waits_for = name;
  running->place = place;
  SwitchBack();
}

}  // namespace

void ReleaseBlock(Block& block) {
  block.arrived = 0;
  block.barrier_place = nullptr;
  JoinBlock(block);
  JoinRounds(block);
  for (Thread& thread : block.threads) {
    if (thread.waits == Waits::kBlock) MakeReady(thread);
  }
}

unsigned Lane() { return running->id % 32; }

void BlockBarrier() {
  const OwnAccount own;
  const void* place = __builtin_return_address(0);
  Block& block = *running->block;
  CountBarrier();
  if (block.barrier_place != nullptr && block.barrier_place != place) {
    Report("threads of a block wait at different barriers", place,
           ", the others at " + PlaceOf(block.barrier_place));
  }
  block.barrier_place = place;
  ++block.arrived;
  if (block.alive < block.threads.size()) {
    Report("a barrier after a thread of the block has exited", place, "");
  }
  if (block.arrived == block.alive) {
    running->waits = Waits::kBlock;
    launch->idle_spins = 0;
    ReleaseBlock(block);
    SwitchBack();
    return;
  }
  Wait(Waits::kBlock, "the barrier of its block", place);
}

void WarpBarrier(std::uint32_t mask) {
  Exchange(mask, "__syncwarp", nullptr, 0, __builtin_return_address(0));
}

const unsigned char* Exchange(std::uint32_t mask, const char* operation, const void* value,
                              std::size_t size, const void* place) {
  const OwnAccount own;
  Thread& self = *running;
  Block& block = *self.block;
  const unsigned warp = self.id / 32;
  const unsigned lane = Lane();
  if ((mask >> lane & 1) == 0) {
    Report("a lane is not in its own mask", place, "");
    AbortThread();
  }
  auto& pending = block.meetings[warp];
  Meeting* meeting = nullptr;
  for (auto& other : pending) {
    if (other->mask == mask && std::strcmp(other->operation, operation) == 0 &&
        other->size == size) {
      meeting = other.get();
    } else if ((other->mask >> lane & 1) != 0 && (other->arrived & mask) != 0) {
      // Its lanes wait for this one, which would wait for one of them.
      Report("lanes of a warp execute different collectives", place,
             std::string(", ") + operation + ", the others at " + other->operation + " at " +
                 PlaceOf(other->place));
      AbortThread();
    }
  }
  if (meeting == nullptr) {
    pending.push_back(std::make_unique<Meeting>());
    meeting = pending.back().get();
    meeting->mask = mask;
    meeting->operation = operation;
    meeting->place = place;
    meeting->size = size;
    // Values of lanes outside the mask are undefined.
    std::memset(meeting->values, 0xFF, 32 * size);
  }
  if (size > 0) std::memcpy(meeting->values + size * lane, value, size);
  meeting->arrived |= 1u << lane;
  const auto results_of = [&](unsigned id) {
    return block.results.data() + std::size_t{id} * 32 * kMostExchanged;
  };
  unsigned char* results = results_of(self.id);
  if (meeting->arrived != mask) {
    Wait(Waits::kWarp, operation, place);
    return results;
  }
  if (std::strcmp(operation, "__syncwarp") == 0) JoinWarp(block, warp, mask);
  JoinRounds(block, warp * 32,
             std::min(warp * 32 + 32, static_cast<unsigned>(block.threads.size())), mask);
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0) continue;
    Thread& thread = block.threads[warp * 32 + other];
    if (size > 0) std::memcpy(results_of(thread.id), meeting->values, 32 * size);
    if (&thread != &self) MakeReady(thread);
  }
  std::erase_if(pending, [&](const auto& each) { return each.get() == meeting; });
  if (Draw(4) == 0) Yield();
  return results;
}

void SpinPause() {
  const OwnAccount own;
  running->spinning = true;
  running->place = __builtin_return_address(0);
  ++launch->idle_spins;
  Yield();
}

void CopyAsync(void* shared, const void* global, std::size_t size) {
  const OwnAccount own;
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global),
                  size};
  OnCopyIssued(copy, __builtin_return_address(0));
  std::memset(shared, 0xFF, size);  // undefined until it is waited for
  running->open.push_back(copy);
}

void CommitCopies() {
  const OwnAccount own;
  CountCommit(running->open.empty());
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void WaitCopies(unsigned left) {
  const OwnAccount own;
  auto& groups = running->groups;
  while (groups.size() > left) {
    CountDelivery();
    for (const Copy& copy : groups.front()) {
      OnCopyDelivered(copy);
      std::memcpy(copy.to, copy.from, copy.size);
    }
    groups.pop_front();
  }
}

}  // namespace diffmic::emulator
