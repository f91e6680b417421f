// Standard normal noise for many rows and timesteps (philox.h).
#ifndef DIFFMIC_CPU_COMMON_NOISE_H_
#define DIFFMIC_CPU_COMMON_NOISE_H_

#include <cstdint>

namespace diffmic::cpu {

// A row of int64 keys; stride in elements.
struct Keys {
  const std::int64_t* data;
  std::int64_t count, stride;
};

// out = compact [timesteps.count, images.count, classes]. Needs samples of images.count keys,
// sample and timestep keys within philox.h's limits, and 1 <= classes <= philox::kMaxClasses.
void PhiloxNormal(std::uint64_t seed, const Keys& images, const Keys& samples,
                  const Keys& timesteps, std::int64_t classes, float* out, int threads);

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_COMMON_NOISE_H_
