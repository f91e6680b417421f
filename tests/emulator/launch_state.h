// The state of the running launch, shared by the parts of the emulator.
#ifndef DIFFMIC_EMULATOR_LAUNCH_STATE_H_
#define DIFFMIC_EMULATOR_LAUNCH_STATE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace diffmic::emulator {

inline constexpr std::size_t kStack = 128 * 1024;  // per thread

using Clock = std::uint32_t;

// A vector clock: what happened before a thread's next operation, as clocks of the threads of its
// own block and as numbers of releases of other blocks.
struct View {
  std::vector<Clock> threads;
  std::vector<std::uint32_t> releases;  // by block; may be shorter
};
using ViewPointer = std::shared_ptr<const View>;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  std::size_t size;
};

enum class Waits { kNothing, kBlock, kWarp, kDone };

struct Block;

struct Thread {
  Block* block;
  unsigned id;        // in its block
  unsigned index[3];  // threadIdx
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  Waits waits = Waits::kNothing;
  const void* place = nullptr;  // the instruction at which it waits
  const char* waits_for = "";
  bool spinning = false;

  // Its own clock, and the clocks of its warp that are newer than the view.
  Clock clock = 1;
  Clock warp[32] = {};
  ViewPointer view;
  ViewPointer fenced;                     // released by a relaxed atomic after a fence
  std::vector<const void*> read_atomics;  // acquired by the next fence
  const void* acquired = nullptr;         // the last acquire, to make polling cheap
  std::uint64_t acquired_version = 0;

  std::vector<Copy> open;  // copies that are not committed
  std::deque<std::vector<Copy>> groups;

  // For the counters (rounds.cpp): waits so far, for loads and for groups of copies; whether the
  // next load is only issued, and when the value of the last such load arrives.
  Rounds rounds;
  std::uint32_t copy_rounds = 0;
  std::deque<std::uint32_t> group_arrivals;
  bool ahead = false;
  Rounds arrival;
  std::vector<std::uint32_t> occurrences;  // per site, for the counters
};

// Lanes of a warp that have reached the same collective operation.
struct Meeting {
  std::uint32_t mask = 0;
  const char* operation = "";
  const void* place = nullptr;
  std::uint32_t arrived = 0;
  std::size_t size = 0;
  unsigned char values[32 * kMostExchanged];
};

struct Block {
  unsigned index[3];
  unsigned number;
  std::vector<Thread> threads;
  std::vector<unsigned> ready;
  unsigned alive = 0, arrived = 0;
  const void* barrier_place = nullptr;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // per warp
  std::vector<unsigned char> results;                           // of exchanges, 32 slots per thread
  std::vector<unsigned char> shared;  // a copy of its shared memory while another block runs
  std::vector<ViewPointer> released;  // the view of each release
  // For the counters: the waits before its last release, and the number of its releases.
  Rounds rounds;
  std::uint32_t copy_rounds = 0;
  std::size_t interval = 0;
};

struct Launch {
  const void* kernel;
  Dim grid, dim;
  std::size_t shared;
  bool cooperative;
  std::vector<Block> blocks;
  std::vector<std::string> faults;
  std::size_t more_faults = 0;
  bool aborted = false;
  int until_preempt = 0;  // in accesses
  long idle_spins = 0;    // polls since the last progress of any thread
};

// Inline functions of the standard library are shared by kernels and the emulator, and are
// instrumented. This guard, in every entry of the emulator, disables the hooks for its own
// accesses.
extern bool in_kernel;
class OwnAccount {
 public:
  OwnAccount() : before_(in_kernel) { in_kernel = false; }
  ~OwnAccount() { in_kernel = before_; }
  OwnAccount(const OwnAccount&) = delete;
  OwnAccount& operator=(const OwnAccount&) = delete;

 private:
  bool before_;
};

extern Launch* launch;   // NULL if none is running
extern Thread* running;  // NULL in the scheduler
std::mt19937& Random();

// scheduler.cpp
unsigned Draw(std::size_t count);  // a number below `count`
void MakeReady(Thread& thread);
void Yield();
[[noreturn]] void AbortThread();  // ends the launch: the faulty operation cannot be executed

// threads.cpp
void ReleaseBlock(Block& block);  // completes its barrier

// report.cpp
std::string NameOf(const void* function);
std::string PlaceOf(const void* address);  // "denoise_kernel.cuh:120"
std::string InWords(const Thread& thread);
// Reports a fault of the running thread at `place`, once per kind and place. IsNews tells whether
// it would be reported, before an expensive `rest` is built.
bool IsNews(const char* kind, const void* place);
void Report(const char* kind, const void* place, const std::string& rest);

// shadow.cpp
struct SharedMemory {
  unsigned char* begin;
  unsigned char* end;
  unsigned char* dynamic;  // the dynamic part, up to its largest size
  unsigned char* dynamic_end;
};
const SharedMemory& Shared();  // of the thread that launches
void ResetSharedShadow(Block& block);
void SwapSharedShadow(Block* from, Block* to);
void BeginShadow();
void EndShadow();
void OnAccess(void* address, std::size_t size, bool write, const void* place);
void OnIndex(long index, const char* array, const void* place);  // past the array's end
void OnMisaligned(void* address, const char* type, const void* place);
void OnAtomic(void* address, std::size_t size, const void* place);
void OnPrefetch(const void* address, const void* place);
void OnCopyIssued(const Copy& copy, const void* place);
void OnCopyDelivered(const Copy& copy);

// ordering.cpp
bool HappenedBefore(unsigned block, unsigned thread, Clock clock);
void JoinWarp(Block& block, unsigned warp, std::uint32_t mask);
void JoinBlock(Block& block);
void Release(const void* address);
void Acquire(const void* address);
void ForgetOrder();

// rounds.cpp
void CountRound(const void* address, bool write);
void CountCommit(bool empty);
void CountDelivery();  // of the oldest group of copies
// Threads of a block that meet: those of `lanes` from `first` to before `past_last`, or all.
void JoinRounds(Block& block, unsigned first, unsigned past_last, std::uint32_t lanes);
void JoinRounds(Block& block);
void EndInterval();  // the running thread's block releases
void EndRounds(Block& block);
void ForgetRounds();

// traffic.cpp
void CountAccess(const void* address, std::size_t size, bool write, bool shared, bool copy,
                 const void* place);
void CountBarrier();
void SumTraffic(Block& block);
void EndTraffic();

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_LAUNCH_STATE_H_
