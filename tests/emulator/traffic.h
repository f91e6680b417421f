// Memory traffic of kernels, counted per request of a warp as on a GPU.
#ifndef DIFFMIC_EMULATOR_TRAFFIC_H_
#define DIFFMIC_EMULATOR_TRAFFIC_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

namespace diffmic::emulator {

struct Interval {
  Rounds loads;
  std::uint32_t copies = 0;
};

struct Traffic {
  std::int64_t launches = 0;
  // Global memory: bytes requested by threads; bytes of the 32-byte sectors of the warps' requests;
  // bytes of the distinct sectors of a launch.
  std::int64_t load_bytes = 0, load_sector_bytes = 0, load_unique_bytes = 0;
  std::int64_t store_bytes = 0, store_sector_bytes = 0, store_unique_bytes = 0;
  std::int64_t copy_bytes = 0;  // the part of load_bytes by asynchronous copies
  // Shared memory: wavefronts, and wavefronts without bank conflicts.
  std::int64_t shared_wavefronts = 0, shared_ideal = 0;
  std::int64_t matrix_instructions = 0, shuffles = 0;  // per warp
  std::int64_t barriers = 0;                           // per thread block
  // Between releases of a block, of which a grid barrier has one: the longest chain of loads that a
  // thread waited for, and of groups of asynchronous copies. The longest of all blocks and
  // launches.
  std::vector<Interval> intervals;
};

std::map<std::string, Traffic>& AllTraffic();  // by kernel name

}  // namespace diffmic::emulator

#endif  // DIFFMIC_EMULATOR_TRAFFIC_H_
