// The arguments of `conditioning`, which the kernels of the CPU and of CUDA both take.
//
// For branches s of rows b and output channels f, with labels l = [y_t ; guidance]:
//   p = W l + bias,  z = gamma_t p,  n = (z - mean) gain + norm_bias,  h1 = x softplus(n),
//   gain = norm_weight / sqrt(variance + eps),
// mean and variance those of the rows of a branch (training) or the running ones.
#ifndef DIFFMIC_INCLUDE_CONDITIONING_CALL_H_
#define DIFFMIC_INCLUDE_CONDITIONING_CALL_H_

#include <cstdint>

#include "include/conditional_layer.h"
#include "include/noising.h"

namespace diffmic::conditioning {

// The layer 2 C -> F. The kernels read running statistics from a Running, not from here, and round
// eps to float.
struct Layer : ConditionalLayer {
  std::int64_t features, classes;
};

// [S, B, C], any strides.
struct Labels {
  const float* data;
  std::int64_t stride[3];
};

// On the CPU timesteps are in gamma's rows. On a GPU, where the host cannot know, one outside of
// them makes its row NaN and adds to no row of gamma's gradient.
struct Batch {
  std::int64_t streams, rows;
  const float* x;  // [B, F]
  std::int64_t x_stride;
  Labels y, guidance;
  const std::int64_t* timesteps;  // [B], or one for all if the stride is 0
  std::int64_t timestep_stride;
  bool training;
};

// BatchNorm's running statistics [F], and in training, with at least 2 rows, where they are written
// after one update per branch, in order. In eval mode nothing is written.
struct Running {
  const float* mean;
  const float* variance;
  float* updated_mean;
  float* updated_variance;
  double momentum;
};

// What normalised: [2, S, F] mean and biased variance of each branch in training, [2, 1, F] copies
// of the running ones in eval mode.
inline std::int64_t StatisticsStreams(const Batch& batch) {
  return batch.training ? batch.streams : 1;
}

// With a noising the labels batch.y are made first, from the guidance as prior, into memory that
// noising.y and batch.y both are.
struct ForwardCall {
  Layer layer;
  Batch batch;
  Noising noising;
  Running running;
  float* statistics;  // compact, written
  float* out;         // [S, B, F], compact, written
};

// Gradients, compact, or NULL if not wanted.
struct Gradients {
  float* x;            // [B, F]
  float* y;            // [S, B, C]
  float* guidance;     // [S, B, C]
  float* weight;       // [F, 2 C]
  float* bias;         // [F]
  float* gamma;        // [T + 1, F], zeros before
  float* norm_weight;  // [F]
  float* norm_bias;    // [F]
};

struct BackwardCall {
  Layer layer;
  Batch batch;
  const float* grad;  // [S, B, F], rows with unit stride
  std::int64_t grad_stride[2];
  const float* statistics;  // those of the forward pass
  Gradients gradients;
};

}  // namespace diffmic::conditioning

#endif  // DIFFMIC_INCLUDE_CONDITIONING_CALL_H_
