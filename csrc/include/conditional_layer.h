// A conditional layer as the model holds it: gamma_t * (W h + b), BatchNorm, softplus
// (docs/algorithm.md, "Denoiser"). Shared by the CPU and CUDA kernels of `conditioning` and
// `denoise`.
#ifndef DIFFMIC_CONDITIONAL_LAYER_H_
#define DIFFMIC_CONDITIONAL_LAYER_H_

#include <cstdint>

namespace diffmic {

// Pointers to float32; strides in elements.
struct ConditionalLayer {
  const float* weight;            // [F, in]
  std::int64_t weight_stride[2];  // of an output channel, of an input
  const float* bias;              // [F]
  const float* gamma;             // [T + 1, F], rows of unit stride
  std::int64_t gamma_rows;        // T + 1
  std::int64_t gamma_stride;      // of a row
  const float* norm_weight;       // [F]
  const float* norm_bias;         // [F]
  const float* running_mean;      // [F]
  const float* running_var;       // [F]
  double eps;                     // of BatchNorm
};

}  // namespace diffmic

#endif  // DIFFMIC_CONDITIONAL_LAYER_H_
