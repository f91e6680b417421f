// What kernels move, counted as a GPU would: by warps.
#ifndef DIFFMIC_EMULATOR_TRAFFIC_H_
#define DIFFMIC_EMULATOR_TRAFFIC_H_

#include <cstdint>
#include <map>
#include <string>

namespace diffmic::emulator {

struct Traffic {
  std::int64_t launches = 0;
  // Global memory: bytes that threads asked for, and those of the 32-byte sectors that the warps'
  // requests touch; and the sectors that a launch touches at all, each counted once.
  std::int64_t load_bytes = 0, load_sector_bytes = 0, load_unique_bytes = 0;
  std::int64_t store_bytes = 0, store_sector_bytes = 0, store_unique_bytes = 0;
  std::int64_t copy_bytes = 0;  // of the loads, those past the registers
  // Shared memory: wavefronts, and those that no bank conflict would need.
  std::int64_t shared_wavefronts = 0, shared_ideal = 0;
  std::int64_t matrix_instructions = 0, shuffles = 0, barriers = 0;  // of warps; of threads' blocks
};

std::map<std::string, Traffic>& AllTraffic();  // by the kernel's name

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_TRAFFIC_H_
