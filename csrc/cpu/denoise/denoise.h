// The reverse chain on the CPU. The definition is diffmic_fast/reference/denoise.py; the numbers
// are its own up to the order of float32 sums (and the roundings of bfloat16 and int8).
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_weights.h"

namespace diffmic::cpu {

// Rows that go through the layers together, which bounds the memory: one block of up to
// kLargestBlock rows, or more blocks of up to kBlockRows.
inline constexpr std::int64_t kBlockRows = 192;
inline constexpr std::int64_t kLargestBlock = 256;

// A conditional layer as the model holds it; strides in elements, rows of unit stride.
struct ConditionalLayerWeights {
  const float* weight;  // [F, 2 C] or [F, F]
  std::int64_t weight_stride;
  const float* bias;
  const float* gamma;  // [T + 1, F]
  std::int64_t gamma_stride;
  const float* norm_weight;
  const float* norm_bias;
  const float* running_mean;
  const float* running_var;
  double eps;
};

struct DenoiserWeights {
  std::int64_t features, classes;
  ConditionalLayerWeights layers[3];
  const float* output_weight;  // [C, F]
  std::int64_t output_stride;
  const float* output_bias;  // [C]
};

// The sampler's n steps; see StepTable in the definition.
struct Steps {
  std::int64_t count;
  const std::int64_t* timesteps;
  const float* s;
  const float* q;
  const float* y0_weight;
  const float* y_weight;
  const float* prior_weight;
  const float* eps_weight;
  const float* sigma;
  std::int64_t start;
};

struct Chain {
  std::int64_t rows;
  const float* features;  // [rows, F]
  std::int64_t features_stride;
  const float* prior;     // compact [rows, C]
  const float* guidance;  // compact [rows, C]
  const float* noise;     // compact [count, rows, C], or NULL: Philox by the keys below
  std::uint64_t seed;
  const std::int64_t* images;   // [rows]
  const std::int64_t* samples;  // [rows]
  float* out;                   // compact [rows, C]
  float* trajectory;            // compact [count + 1, rows, C], or NULL
};

struct DenoiseOptions {
  Precision precision = Precision::kFloat32;
  const DenoiseKernels* kernels = nullptr;
  int threads = 1;
  WeightCache* cache = nullptr;  // where the model's packed weights are kept, if they are
  // The most steps of a chain that may be taken at once (denoise_window.cpp); 1: one after the
  // other. The result's bits are the same, unless states may differ by a tolerance.
  std::int64_t window = 1;
  float tolerance = 0.0f;
  std::int64_t* sweeps = nullptr;  // counts the evaluations of all blocks
  // Called from the caller's thread every tenth of a second with the steps done and those in all
  // (over all blocks of rows); false stops the chain.
  std::function<bool(std::int64_t, std::int64_t)> watch;
};

// False if `watch` stopped it: out then holds nothing of use. Memory beyond the arguments: blocks
// of up to 256 rows of activations, twice, and the packed hidden weights.
bool Denoise(const DenoiserWeights& weights, const Steps& steps, const Chain& chain,
             const DenoiseOptions& options);

// The same by windows of several steps; called by Denoise.
bool DenoiseWindows(const DenoiserWeights& weights, const Steps& steps, const Chain& chain,
                    const DenoiseOptions& options);

// The kernels of that name ("auto": the widest that this processor has, and no emulation) for a
// precision, or NULL.
const DenoiseKernels* FindDenoiseKernels(const std::string& name, Precision precision);

// The names that FindDenoiseKernels knows and can serve here.
std::vector<std::string> DenoiseKernelNames();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_H_
