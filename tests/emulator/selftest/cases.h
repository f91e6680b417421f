// Small kernels that test the emulator, each in a correct version and in versions with one fault.
#ifndef DIFFMIC_EMULATOR_SELFTEST_CASES_H_
#define DIFFMIC_EMULATOR_SELFTEST_CASES_H_

#include <cstdint>
#include <vector>

#include "cuda/common/launch.cuh"

namespace diffmic::selftest {

// The signature of all cases: `count` elements of input and output; `workspace` is uninitialised
// except for its first 16 words, which are zero.
using Kernel = void (*)(const float* in, float* out, std::uint32_t* workspace, int count);

struct Case {
  const char* kernel;  // the name of its computation
  const char* fault;   // "" if correct
  Kernel function;
  cuda::LaunchShape shape;
};

std::vector<Case> Barriers();  // of blocks and warps
std::vector<Case> Bounds();    // bounds, alignment, uninitialised memory
std::vector<Case> Copies();    // asynchronous copies in a pipeline with mma instructions
std::vector<Case> Grids();     // synchronisation of blocks
std::vector<Case> Latency();   // loads that wait for each other, and loads that do not
std::vector<Case> Warps();     // shuffles

}  // namespace diffmic::selftest

#endif  // DIFFMIC_EMULATOR_SELFTEST_CASES_H_
