// The state of the launch that runs, shared by the emulator's own parts.
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

inline constexpr std::size_t kStack = 128 * 1024;  // of a thread

using Clock = std::uint32_t;

// What a thread knows to have happened before: of its own block's threads up to which of their
// clocks, of other blocks up to which of their releases.
struct View {
  std::vector<Clock> threads;
  std::vector<std::uint32_t> releases;  // empty: of none
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
  const void* place = nullptr;  // where in the program it waits
  const char* waits_for = "";
  bool spinning = false;

  // Clocks: its own, and what it knows of its warp beyond the view.
  Clock clock = 1;
  Clock warp[32] = {};
  ViewPointer view;
  ViewPointer fenced;                     // what a relaxed atomic behind a fence releases
  std::vector<const void*> read_atomics;  // what the next fence acquires
  const void* acquired = nullptr;         // the last acquire, so that spinning costs nothing
  std::uint64_t acquired_version = 0;

  std::vector<Copy> open;  // copies that are in no group yet
  std::deque<std::vector<Copy>> groups;
  std::vector<std::uint32_t> occurrences;  // of each site, for the counters
};

// Lanes of a warp that came to the same exchange.
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
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // of each warp
  std::vector<unsigned char> results;                           // of exchanges: 32 slots a thread
  std::vector<unsigned char> shared;  // a copy of its shared memory while another block runs
  std::vector<ViewPointer> released;  // after each of its releases
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
  int until_preempt = 0;  // accesses
  long idle_spins = 0;    // turns of spinning threads since the last progress of any thread
};

// The library code that kernels use is compiled once, with the hooks in it, and the emulator uses
// it too: what it does on its own account is no access of a kernel. One guard at every way in.
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

extern Launch* launch;   // NULL while none runs
extern Thread* running;  // NULL outside of threads
std::mt19937& Random();

// scheduler.cpp
unsigned Draw(std::size_t count);  // a number below `count`
void MakeReady(Thread& thread);
void Yield();
[[noreturn]] void AbortThread();  // ends the launch: what the thread is about to do cannot be done

// threads.cpp
void ReleaseBlock(Block& block);  // from its barrier

// report.cpp
std::string NameOf(const void* function);
std::string PlaceOf(const void* address);  // "denoise_kernel.cuh:120"
std::string InWords(const Thread& thread);
// Adds a fault of the running thread at `place`. Only the first of each kind and place is kept: ask
// for news where `rest` is costly.
bool IsNews(const char* kind, const void* place);
void Report(const char* kind, const void* place, const std::string& rest);

// shadow.cpp
struct SharedMemory {
  unsigned char* begin;
  unsigned char* end;
  unsigned char* dynamic;  // where the dynamic part begins, `dynamic_end` past its largest size
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
void OnCopyIssued(const Copy& copy, const void* place);
void OnCopyDelivered(const Copy& copy);

// ordering.cpp
bool HappenedBefore(unsigned block, unsigned thread, Clock clock);
void JoinWarp(Block& block, unsigned warp, std::uint32_t mask);
void JoinBlock(Block& block);
void Release(const void* address);
void Acquire(const void* address);
void ForgetOrder();

// traffic.cpp
void CountAccess(const void* address, std::size_t size, bool write, bool shared, bool copy,
                 const void* place);
void CountBarrier();
void SumTraffic(Block& block);
void EndTraffic();

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_LAUNCH_STATE_H_
