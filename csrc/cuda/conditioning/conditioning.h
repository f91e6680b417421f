// The denoiser's first layer on a GPU. The definition is diffmic_fast/reference/conditioning.py,
// and what is computed stands in cpu/conditioning.h, with the same names.
//
// How the work is divided. A unit needs nothing of another one: a block takes a slice of kSlice
// units with all streams and all rows, so that batch statistics stay inside it, and x, gradient and
// result cross the memory bus once. A row of a slice is 128 bytes, read by 8 threads of four units
// each, 32 rows side by side. Labels and weights lie in shared memory, and so do the products of a
// tile of rows:
//   forward   eval: a block a slice and tile; one kernel
//             training: all rows are one tile where they fit (some 150 for three streams), and one
//             kernel does all; else one kernel takes the moments, tile after tile, and that of the
//             eval mode does the rest
//   backward  the same where all rows are one tile (some 75 for three streams, any number in eval
//             mode); else the block goes through its tiles twice, first for the sums over rows
//             that the batch statistics give back. Gradients of labels are sums over all units:
//             each block leaves its own in `label_sums`, and a second kernel adds them up.
// Noisy labels may be made here too (noising.h): by each block for its own use, and by those of the
// first slice to be kept. It is one more float64 Philox and Box-Muller a block for what else were a
// launch or several, and a trip to memory.
// All sums have one order, whatever the alignment and the device: results have the same bits in
// each run, and in eval mode a row has them in any batch.
//
// What is kept for the backward pass: mean and variance, [2, S, F] floats.
//
// Arithmetic, S = 3, B = 32, C = 5, F = 6144, an element being one of the S B F = 590 000:
//   forward: x, the rows of gamma, W, h1 and eight arrays of F once each, 4.5 MB; the labels,
//     3.8 KB, by each of 192 blocks, from the second-level cache: 0.7 MB. 60 operations an element.
//   backward: these, the gradient of h1, and what is written, 6.2 MB; gradients of labels
//     another 0.7 MB each way, inside the second-level cache. 110 operations an element.
// At 3.35 TB/s that is 1.4 and 1.9 us, less than a launch costs. Larger batches are bound by
// memory.
#ifndef DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_
#define DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "include/noising.h"

namespace diffmic::cuda::conditioning {

inline constexpr int kSlice = 32;  // units of a block

// Parameters of the layer, 2 C -> F. Strides in elements; arrays of F have none.
struct Layer {
  std::int64_t features, classes;
  const float* weight;  // [F, 2 C]
  std::int64_t weight_stride[2];
  const float* bias;   // [F]
  const float* gamma;  // [T + 1, F]
  std::int64_t gamma_rows, gamma_stride;
  const float* norm_weight;  // [F]
  const float* norm_bias;    // [F]
  float eps;
};

// [S, B, C], any strides.
struct Labels {
  const float* data;
  std::int64_t stride[3];
};

// A timestep outside of gamma's rows, which no host can look for, makes its row not-a-number, and
// adds to no row of gamma's gradient.
struct Batch {
  std::int64_t streams, rows;
  const float* x;  // [B, F]
  std::int64_t x_stride;
  Labels y, guidance;
  const std::int64_t* timesteps;  // [B], or one for all where the stride is 0
  std::int64_t timestep_stride;
  bool training;
};

// In training, `updated` mean and variance [F] are those of BatchNorm's `running` ones behind one
// update a stream, in order, and rows are 2 at least; in eval mode they are not touched.
struct Running {
  const float* mean;
  const float* variance;
  float* updated_mean;
  float* updated_variance;
  double momentum;
};

// What normalised: [2, S, F] mean and biased variance of each stream's rows in training, [2, 1, F]
// copies of the running ones in eval mode.
inline std::int64_t StatisticsStreams(const Batch& batch) {
  return batch.training ? batch.streams : 1;
}

// out [S, B, F] and statistics, compact. With a noising the labels batch.y are made from the
// guidance as prior, into memory that noising.y and batch.y both are.
void Forward(const Layer& layer, const Batch& batch, const Noising& noising, const Running& running,
             float* statistics, float* out, cudaStream_t stream);

// Gradients, compact, or NULL where not wanted. That of gamma holds zeros before.
struct Gradients {
  float* x;            // [B, F]
  float* y;            // [S, B, C]
  float* guidance;     // [S, B, C]
  float* weight;       // [F, 2 C]
  float* bias;         // [F]
  float* gamma;        // [T + 1, F]
  float* norm_weight;  // [F]
  float* norm_bias;    // [F]
};

// Floats of `label_sums`, scratch memory that is there where labels' gradients are wanted.
std::int64_t LabelSums(std::int64_t features, std::int64_t streams, std::int64_t rows,
                       std::int64_t classes);

// From grad [S, B, F], whose elements of a row are side by side, and Forward's statistics.
void Backward(const Layer& layer, const Batch& batch, const float* grad,
              const std::int64_t (&grad_stride)[2], const float* statistics,
              const Gradients& gradients, float* label_sums, cudaStream_t stream);

}  // namespace diffmic::cuda::conditioning

#endif  // DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_
