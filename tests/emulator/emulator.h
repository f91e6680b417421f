// The emulator of CUDA kernels: what the headers of include/ call, and what the parts of the
// emulator share. README.md tells how it works.
#ifndef DIFFMIC_EMULATOR_EMULATOR_H_
#define DIFFMIC_EMULATOR_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace diffmic::emulator {

// What a launch found, all of it in what().
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Mode {
  kPlain,    // runs kernels in a hostile order and checks nothing but barriers
  kChecked,  // races, bounds, alignment, memory that nothing was written to
  kCounted,  // the same, and the traffic of every kernel
};

struct Config {
  std::uint32_t seed = 1;
  int preempt = 24;  // one access in so many ends a thread's turn; 0: none
  Mode mode = Mode::kChecked;
  // The device.
  int multiprocessors = 4;
  int shared_per_block = 227 * 1024;
  int shared_per_multiprocessor = 228 * 1024;
  int threads_per_multiprocessor = 2048;
};
extern Config config;

struct Dim {
  unsigned x, y, z;
};

// Runs `body` once as every thread of every block; throws Fault. `kernel` is its address, to name
// it.
void Run(const void* kernel, Dim grid, Dim block, std::size_t shared, bool cooperative,
         const std::function<void()>& body);

// ---- what a thread of a kernel does; each may let others run first ------------------------------

unsigned Lane();
void BlockBarrier();
void WarpBarrier(std::uint32_t mask);

// All lanes of `mask` come with `size` bytes at `value`, at most kMostExchanged, for the same
// `operation`; returns 32 times `size` bytes, one slot a lane, until the thread's next call.
// `place` is where in the kernel.
inline constexpr std::size_t kMostExchanged = 64;
const unsigned char* Exchange(std::uint32_t mask, const char* operation, const void* value,
                              std::size_t size, const void* place);

void CopyAsync(void* shared, const void* global, std::size_t size);
void CommitCopies();
void WaitCopies(unsigned left);

enum class Order { kRelaxed, kRelease, kAcquire };
// Before an atomic operation on memory: checks it and orders this thread with others.
void Atomic(void* address, std::size_t size, Order order);
void Fence();
void SpinPause();

enum class Event { kMatrix, kShuffle };
void Count(Event event);

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_EMULATOR_H_
