// Noise of rows (image, sample) at given timesteps. A thread takes whole [classes] rows; a value
// depends on its key alone, not on the number of threads. Some 140 float64 operations per counter,
// which gives four values (16 bytes): bound by arithmetic.
#include "cpu/common/noise.h"

#include <algorithm>

#include "cpu/common/parallel.h"
#include "include/philox.h"

namespace diffmic::cpu {

void PhiloxNormal(std::uint64_t seed, const Keys& images, const Keys& samples,
                  const Keys& timesteps, std::int64_t classes, float* out, int threads) {
  // A thread pays off from some 1,000 counters (50 us) on.
  const std::int64_t blocks = (classes + 3) / 4;
  ParallelFor(timesteps.count * images.count, threads, 1 + 1000 / blocks,
              [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t item = begin; item < end; ++item) {
                  const std::int64_t k = item / images.count;
                  const std::int64_t m = item % images.count;
                  const auto image = static_cast<std::uint64_t>(images.data[m * images.stride]);
                  const auto sample = static_cast<std::uint32_t>(samples.data[m * samples.stride]);
                  const auto timestep =
                      static_cast<std::uint32_t>(timesteps.data[k * timesteps.stride]);
                  float* row = out + item * classes;
                  for (std::int64_t c = 0; c < classes; c += 4) {
                    const philox::Normals normals = philox::Normal(
                        seed, image, sample, timestep, static_cast<std::uint32_t>(c / 4));
                    std::copy_n(normals.z, std::min<std::int64_t>(4, classes - c), row + c);
                  }
                }
              });
}

}  // namespace diffmic::cpu
