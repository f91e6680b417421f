// Small kernels, each right and with one fault planted: what the emulator has to find, and what it
// must not blame.
#ifndef DIFFMIC_EMULATOR_SELFTEST_KERNELS_H_
#define DIFFMIC_EMULATOR_SELFTEST_KERNELS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace diffmic::selftest {

struct Buffers {
  const float* input;      // [1024]
  float* output;           // [1024], nothing there yet
  float* workspace;        // [1024], nothing there yet
  std::uint32_t* counter;  // zero
};

struct Case {
  std::string name;  // the kernel, and behind a colon the fault
  bool right;
  void (*run)(const Buffers&);
};

const std::vector<Case>& Cases();

}  // namespace diffmic::selftest

#endif  // DIFFMIC_EMULATOR_SELFTEST_KERNELS_H_
