// Single instructions, which test_emulator.py compares with their definitions in CUDA's manuals.
#ifndef DIFFMIC_EMULATOR_SELFTEST_INSTRUCTIONS_H_
#define DIFFMIC_EMULATOR_SELFTEST_INSTRUCTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/common/launch.cuh"

namespace diffmic::selftest {

struct Instruction {
  std::string name;
  void (*function)(const std::uint32_t* in, std::uint32_t* out, int count);
  cuda::LaunchShape shape;
};

std::vector<Instruction> Instructions();

}  // namespace diffmic::selftest

#endif  // DIFFMIC_EMULATOR_SELFTEST_INSTRUCTIONS_H_
