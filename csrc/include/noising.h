// The forward process on the labels of a training step (docs/algorithm.md, "Forward process"), for
// host and device. For branches s, rows b and classes c
//   y_t[s, b, c] = a y_0[b, c] + (1 - a) prior[s, b, c] + d noise[b, c],
// with a and d of the row's timestep, and the same noise for all branches. Each operation is
// rounded on its own, in this order: bitwise identical to diffmic_fast/reference/conditioning.py
// (philox.h states the compiler options that this requires).
#ifndef DIFFMIC_NOISING_H_
#define DIFFMIC_NOISING_H_

#include <cmath>
#include <cstdint>

#include "include/philox.h"

namespace diffmic {

struct Noising {
  const float* y_0;  // [B, C], any strides; null if the labels are noisy already
  std::int64_t y_0_stride[2];
  const float* sqrt_alpha_bar;            // [T], compact as all below
  const float* sqrt_one_minus_alpha_bar;  // [T]
  std::int64_t timesteps;                 // T
  std::uint64_t seed;
  const std::int64_t* images;   // [B], or null: the row indices
  const std::int64_t* samples;  // [B], or null: 0
  const float* given;           // [B, C] noise, or null: Philox noise at timestep 0
  float* drawn;                 // [B, C] output: that noise; null with `given`
  float* y;                     // [S, B, C] output
};

// The noise of classes 4 block ... 4 block + 3 of a row; 0 beyond the last class, NaN for a sample
// outside of the range of keys.
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

// a and d of a timestep; NaN outside of the schedule.
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
