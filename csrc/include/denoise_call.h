// The arguments of `denoise`, as both its CPU and its CUDA implementation take them. The definition
// is diffmic_fast/reference/denoise.py; csrc/bindings/denoise.cpp fills these structs from Python.
// Pointers are to the memory of the implementation's device, strides in elements.
#ifndef DIFFMIC_DENOISE_CALL_H_
#define DIFFMIC_DENOISE_CALL_H_

#include <cstdint>

#include "include/conditional_layer.h"
#include "include/precision.h"

namespace diffmic {

// The denoiser without its image encoder. All matrices have rows of unit stride.
struct DenoiserWeights {
  std::int64_t features, classes;  // F, C
  ConditionalLayer layers[3];      // 2 C -> F, F -> F, F -> F
  const float* output_weight;      // [C, F]
  std::int64_t output_stride;      // of an output channel
  const float* output_bias;        // [C]
};

// A sampler of n steps: StepTable of the definition.
struct StepTable {
  std::int64_t count;             // n
  const std::int64_t* timesteps;  // [n]
  const float* coefficients;      // [7, n], in the order of the functions below
  std::int64_t start;             // the timestep that addresses the first noise

  const float* s() const { return coefficients; }
  const float* q() const { return coefficients + count; }
  const float* y0_weight() const { return coefficients + 2 * count; }
  const float* y_weight() const { return coefficients + 3 * count; }
  const float* prior_weight() const { return coefficients + 4 * count; }
  const float* eps_weight() const { return coefficients + 5 * count; }
  const float* sigma() const { return coefficients + 6 * count; }
};

struct DenoiseCall {
  DenoiserWeights weights;
  StepTable steps;
  std::int64_t rows;      // M
  const float* features;  // [M, F], rows of unit stride
  std::int64_t features_stride;
  const float* prior;     // [M, C], contiguous as all that follow
  const float* guidance;  // [M, C]
  const float* noise;     // [n, M, C], or null: Philox noise addressed by the keys below
  std::uint64_t seed;
  const std::int64_t* image_ids;   // [M]
  const std::int64_t* sample_ids;  // [M]
  float* out;                      // [M, C]
  float* trajectory;               // [n + 1, M, C], or null
  Precision precision;
  std::int64_t window;  // the most steps of a chain per sweep, at least 1
  float tolerance;      // of the states of a window; 0: the bits of one step per sweep
};

}  // namespace diffmic

#endif  // DIFFMIC_DENOISE_CALL_H_
