// The noisy labels of a training step, for host and device code: of streams s, rows b, classes c
//   y_t[s, b, c] = a y_0[b, c] + (1 - a) prior[s, b, c] + d noise[b, c],
// a and d the schedule's of the row's timestep, one noise for all streams. The definition is
// diffmic_fast/reference/conditioning.py; each operation is rounded on its own, in this order, so
// that these are its very bits (philox.h says what that asks of a compiler).
#ifndef DIFFMIC_NOISING_H_
#define DIFFMIC_NOISING_H_

#include <cmath>
#include <cstdint>

#include "include/philox.h"

namespace diffmic {

struct Noising {
  const float* y_0;  // [B, C], any strides; NULL where labels come with their noise
  std::int64_t y_0_stride[2];
  const float* sqrt_alpha_bar;            // [T], compact as all below
  const float* sqrt_one_minus_alpha_bar;  // [T]
  std::int64_t timesteps;                 // T
  std::uint64_t seed;
  const std::int64_t* images;   // [B], or NULL: the rows' numbers
  const std::int64_t* samples;  // [B], or NULL: 0
  const float* given;           // [B, C]: the noise, or NULL: Philox's, at timestep 0 of its key
  float* drawn;                 // [B, C]: that noise, written; NULL with `given`
  float* y;                     // [S, B, C], written
};

// The noise of classes 4 block ... 4 block + 3 of a row; 0 beyond the last class. Not-a-number for
// a sample that has no key.
DIFFMIC_HOST_DEVICE inline philox::Normals NoiseOf(const Noising& n, std::int64_t row,
                                                   std::int64_t block, std::int64_t classes) {
  if (n.given != nullptr) {
    philox::Normals read{};
    for (int i = 0; i < 4; ++i) {
      if (4 * block + i < classes) read.z[i] = n.given[row * classes + 4 * block + i];
    }
    return read;
  }
  const std::int64_t image = n.images == nullptr ? row : n.images[row];
  const std::int64_t sample = n.samples == nullptr ? 0 : n.samples[row];
  philox::Normals drawn =
      philox::Normal(n.seed, static_cast<std::uint64_t>(image), static_cast<std::uint32_t>(sample),
                     0, static_cast<std::uint32_t>(block));
  if (sample < 0 || sample > philox::kMaxSample) {
    for (float& z : drawn.z) z = NAN;
  }
  return drawn;
}

// a and d of a timestep; not-a-number where the schedule does not have it.
struct Mixture {
  float label, noise;
};
DIFFMIC_HOST_DEVICE inline Mixture MixtureOf(const Noising& n, std::int64_t timestep) {
  if (timestep < 0 || timestep >= n.timesteps) return {NAN, NAN};
  return {n.sqrt_alpha_bar[timestep], n.sqrt_one_minus_alpha_bar[timestep]};
}

DIFFMIC_HOST_DEVICE inline float NoisyLabel(const Mixture& m, float y_0, float prior, float noise) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fadd_rn(__fmul_rn(m.label, y_0), __fmul_rn(__fsub_rn(1.0f, m.label), prior)),
                   __fmul_rn(m.noise, noise));
#else
  return m.label * y_0 + (1.0f - m.label) * prior + m.noise * noise;
#endif
}

}  // namespace diffmic

#endif  // DIFFMIC_NOISING_H_
