// The emulator of CUDA kernels: the interface for the headers of include/ and for the emulator's
// own parts. docs/emulator.md describes how it works.
#ifndef DIFFMIC_EMULATOR_EMULATOR_H_
#define DIFFMIC_EMULATOR_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace diffmic::emulator {

// The faults of a launch, all of them in what().
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Mode {
  kPlain,    // randomises the schedule and checks barriers only
  kChecked,  // also checks races, bounds, alignment and uninitialised memory
  kCounted,  // also counts the traffic of every kernel
};

struct Config {
  std::uint32_t seed = 1;
  int preempt = 24;  // mean number of accesses before a thread is preempted; 0: never
  Mode mode = Mode::kChecked;
  // Properties of the device.
  int multiprocessors = 4;
  int shared_per_block = 227 * 1024;
  int shared_per_multiprocessor = 228 * 1024;
  int threads_per_multiprocessor = 2048;
};
extern Config config;

struct Dim {
  unsigned x, y, z;
};

// Runs `body` as every thread of every block; throws Fault. `kernel` is the kernel's address, for
// its name.
void Run(const void* kernel, Dim grid, Dim block, std::size_t shared, bool cooperative,
         const std::function<void()>& body);

// A limit of dynamic shared memory that a launcher has set for a kernel.
struct SharedLimit {
  const void* kernel;
  int bytes;
};
// All of them so far, in order.
std::vector<SharedLimit> SharedLimits();

// ---- operations of a kernel's thread; each may switch to other threads -------------------------

unsigned Lane();
void BlockBarrier();
void WarpBarrier(std::uint32_t mask);

// A collective `operation` of the lanes of `mask`, each of which passes `size` bytes at `value`, at
// most kMostExchanged. Returns the values, one slot of `size` bytes per lane, valid until the
// thread's next call. `place` is the calling instruction.
inline constexpr std::size_t kMostExchanged = 64;
const unsigned char* Exchange(std::uint32_t mask, const char* operation, const void* value,
                              std::size_t size, const void* place);

void CopyAsync(void* shared, const void* global, std::size_t size);
void CommitCopies();
void WaitCopies(unsigned left);

enum class Order { kRelaxed, kRelease, kAcquire };
// Called before an atomic operation: checks the access and orders this thread with others.
void Atomic(void* address, std::size_t size, Order order);
void Fence();
void SpinPause();

enum class Event { kMatrix, kShuffle };
void Count(Event event);

// ---- latency -----------------------------------------------------------------------------------

// Loads from global memory that a thread waited for one after the other.
struct Rounds {
  std::uint32_t l2 = 0, dram = 0;
};
// The next load of this thread is only issued: EndAhead returns when its value arrives.
void BeginAhead();
Rounds EndAhead();
void Await(const Rounds& arrival);   // the value is used
void Prefetch(const void* address);  // into the L2 cache

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_EMULATOR_H_
