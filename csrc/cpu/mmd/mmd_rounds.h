// The order in which all pairs of blocks are processed: each pair once, and for each block in an
// order that does not depend on the threads.
//
// First each block is paired with itself; then follow the rounds of a round-robin tournament, in
// which each block is paired with one other, so that the pairs of a round can run in parallel: a
// pair's tile is added to the accumulators of both blocks, which no other pair of the round uses.
// The order per block is fixed, hence the bits of its sums. There is no barrier: a pair waits for
// the previous pairs of its two blocks, which are about a whole round back.
#ifndef DIFFMIC_CPU_MMD_MMD_ROUNDS_H_
#define DIFFMIC_CPU_MMD_MMD_ROUNDS_H_

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/common/parallel.h"

namespace diffmic::cpu::mmd {

class Rounds {
 public:
  struct Pair {
    std::int64_t first, second;  // first <= second; second < 0: no partner in this round
    std::uint32_t round;         // 0: each block with itself
    bool last;                   // the last pair of both blocks
  };

  explicit Rounds(std::int64_t blocks)
      : blocks_(blocks), circle_(blocks % 2 == 0 ? blocks - 1 : blocks), done_(Size(blocks)) {}

  // Circle method: in every round the pairs lie symmetrically around one block of the circle, which
  // is paired with the block outside of it (even counts) or with none.
  std::int64_t count() const { return blocks_ + circle_ * ((circle_ + 1) / 2); }

  Pair pair(std::int64_t index) const {
    if (index < blocks_) return {index, index, 0, false};
    const std::int64_t each = (circle_ + 1) / 2;
    const std::int64_t round = (index - blocks_) / each, place = (index - blocks_) % each;
    Pair pair = {(round + place) % circle_, (round - place + circle_) % circle_,
                 static_cast<std::uint32_t>(round + 1), round + 1 == circle_};
    if (place == 0) pair.second = circle_ < blocks_ ? circle_ : -1;
    if (pair.second >= 0 && pair.first > pair.second) {
      std::swap(pair.first, pair.second);
    }
    return pair;
  }

  // Pairs must begin in the order of their indices: then none waits for one that has not begun.
  void Begin(const Pair& pair) {
    Wait(pair.first, pair.round);
    if (pair.second >= 0) Wait(pair.second, pair.round);
  }

  void End(const Pair& pair) {
    Notify(pair.first, pair.round);
    if (pair.second >= 0 && pair.second != pair.first) Notify(pair.second, pair.round);
  }

 private:
  static std::size_t Size(std::int64_t value) { return static_cast<std::size_t>(value); }

  void Wait(std::int64_t block, std::uint32_t round) {
    std::atomic<std::uint32_t>& done = done_[Size(block)];
    for (int spin = 0; spin < 1000; ++spin) {
      if (done.load(std::memory_order_acquire) == round) return;
      SpinPause();
    }
    for (std::uint32_t now; (now = done.load(std::memory_order_acquire)) != round;) done.wait(now);
  }

  void Notify(std::int64_t block, std::uint32_t round) {
    done_[Size(block)].store(round + 1, std::memory_order_release);
    done_[Size(block)].notify_all();
  }

  std::int64_t blocks_, circle_;
  std::vector<std::atomic<std::uint32_t>> done_;  // rounds that a block has completed
};

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_ROUNDS_H_
