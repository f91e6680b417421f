// Small kernels that prove the emulator: each right once and wrong in one way, so that a test can
// see the fault caught under every schedule and the right kernel never blamed.
#ifndef DIFFMIC_EMULATOR_SELFTEST_CASES_H_
#define DIFFMIC_EMULATOR_SELFTEST_CASES_H_

#include <cstdint>
#include <vector>

#include "cuda/common/launch.cuh"

namespace diffmic::selftest {

// One signature for all: `count` numbers come in and go out, `workspace` holds nothing at first but
// for its first 16 words, which are zero.
using Kernel = void (*)(const float* in, float* out, std::uint32_t* workspace, int count);

struct Case {
  const char* kernel;  // what it does
  const char* fault;   // what is wrong with it, "" for nothing
  Kernel function;
  cuda::LaunchShape shape;
};

std::vector<Case> Barriers();  // of blocks and warps
std::vector<Case> Bounds();    // of memory: limits, alignment, what is not there yet
std::vector<Case> Copies();    // asynchronous ones, in a pipeline with matrix instructions
std::vector<Case> Grids();     // blocks that wait for each other
std::vector<Case> Warps();     // exchanges

}  // namespace diffmic::selftest

#endif  // DIFFMIC_EMULATOR_SELFTEST_CASES_H_
