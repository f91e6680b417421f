// Every two blocks meet once, in an order of which each block keeps its part, whatever the threads.
//
// First each block meets itself; then come the rounds of a round-robin tournament, in which each
// block meets one other, so that a whole round can be shared out: the tile of two blocks is added
// to the sums of both, and nobody else touches these meanwhile. The order of a block's meetings is
// fixed, and so are the bits of its sums. There is no barrier: a meeting waits for the blocks' last
// ones, which are about a whole round away.
#ifndef DIFFMIC_CPU_MMD_MMD_ROUNDS_H_
#define DIFFMIC_CPU_MMD_MMD_ROUNDS_H_

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace diffmic::cpu::mmd {

class Rounds {
 public:
  struct Meeting {
    std::int64_t first, second;  // first <= second; second < 0: the first rests
    std::uint32_t round;         // 0 is that of the blocks with themselves
    bool last;                   // of each of the two
  };

  explicit Rounds(std::int64_t blocks)
      : blocks_(blocks), circle_(blocks % 2 == 0 ? blocks - 1 : blocks), done_(Size(blocks)) {}

  // Of the circle, two stand at equal distances from one that turns with the round and meets the
  // block outside of it, or rests where the circle is all.
  std::int64_t count() const { return blocks_ + circle_ * ((circle_ + 1) / 2); }

  Meeting meeting(std::int64_t index) const {
    if (index < blocks_) return {index, index, 0, false};
    const std::int64_t each = (circle_ + 1) / 2;
    const std::int64_t round = (index - blocks_) / each, place = (index - blocks_) % each;
    Meeting meeting = {(round + place) % circle_, (round - place + circle_) % circle_,
                       static_cast<std::uint32_t>(round + 1), round + 1 == circle_};
    if (place == 0) meeting.second = circle_ < blocks_ ? circle_ : -1;
    if (meeting.second >= 0 && meeting.first > meeting.second) {
      std::swap(meeting.first, meeting.second);
    }
    return meeting;
  }

  // Meetings are to be begun in the order of their indices: then none waits for one not begun.
  void Begin(const Meeting& meeting) {
    Wait(meeting.first, meeting.round);
    if (meeting.second >= 0) Wait(meeting.second, meeting.round);
  }

  void End(const Meeting& meeting) {
    Tell(meeting.first, meeting.round);
    if (meeting.second >= 0 && meeting.second != meeting.first) Tell(meeting.second, meeting.round);
  }

 private:
  static std::size_t Size(std::int64_t value) { return static_cast<std::size_t>(value); }

  void Wait(std::int64_t block, std::uint32_t round) {
    std::atomic<std::uint32_t>& done = done_[Size(block)];
    for (int spin = 0; spin < 1000; ++spin) {
      if (done.load(std::memory_order_acquire) == round) return;
      Pause();
    }
    for (std::uint32_t now; (now = done.load(std::memory_order_acquire)) != round;) done.wait(now);
  }

  void Tell(std::int64_t block, std::uint32_t round) {
    done_[Size(block)].store(round + 1, std::memory_order_release);
    done_[Size(block)].notify_all();
  }

  static void Pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::int64_t blocks_, circle_;
  std::vector<std::atomic<std::uint32_t>> done_;  // rounds that a block has behind it
};

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_ROUNDS_H_
