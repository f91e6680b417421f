// The denoiser's first layer on the CPU. The definition is diffmic_fast/reference/conditioning.py.
//
// What is computed. For streams s of rows b and units f, with labels l = [y_t ; guidance]:
//   p = W l + bias,  z = gamma_t p,  n = (z - mean) gain + norm_bias,  h1 = x softplus(n),
//   gain = norm_weight / sqrt(variance + eps),
// mean and variance those of a stream's rows (training) or the running ones; and from the gradient
// of h1 those of every argument.
//
// How the work is divided. A unit needs nothing of another one: a thread takes a few chunks of
// kUnits units at a time, with all streams and rows, and its vectors lie across units. Sums over
// rows are therefore a thread's own, taken in the order of the rows and in double where they are a
// statistic; sums over units (the labels' gradients) are kept for each share of the chunks, whose
// number depends on nothing but F, and added up in order. So the bits do not depend on the number
// of threads, and in eval mode a row is alone: it has the same bits in any batch.
//
// What is kept for the backward pass: mean and variance, [2, S, F] floats, and the arguments that
// are there anyhow. p, z and n are computed again, 2 C multiply-adds an element.
//
// Arithmetic, S = 3, B = 32, C = 5, F = 6144, an element being one of the S B F = 590 000:
//   forward: reads x, the rows of gamma and W, writes h1: 4 F (2 B + 2 C + 1 + S B) = 4.2 MB; some
//     60 operations an element (half of them softplus's exponential and logarithm), 35 MFLOP.
//   backward: reads these and the gradient of h1, writes those of x, W and the rows of gamma that
//     were used: 6 MB; some 110 operations an element, 65 MFLOP.
// Both are bound by operations on one core, and by memory on many. The gradient of gamma has all of
// its T + 1 rows, 25 MB of zeros that the caller writes: more than all the rest.
// A thread's own memory is 3 B kUnits floats, and 4 C kUnits for weights; per chunk, it stays in L1
// and L2 up to B = 512 or so.
#ifndef DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_
#define DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_

#include <cstdint>
#include <string>
#include <vector>

#include "include/noising.h"

namespace diffmic::cpu::conditioning {

struct Kernels;

// "auto" (the widest of this processor), or one of KernelNames(). Null where there is none.
const Kernels* FindKernels(const std::string& name);
std::vector<std::string> KernelNames();

// Parameters of the layer, 2 C -> F. Strides in elements; arrays of F have none.
struct Layer {
  std::int64_t features, classes;
  const float* weight;  // [F, 2 C]
  std::int64_t weight_stride[2];
  const float* bias;   // [F]
  const float* gamma;  // [T + 1, F]
  std::int64_t gamma_stride;
  const float* norm_weight;  // [F]
  const float* norm_bias;    // [F]
  float eps;
};

// [S, B, C], any strides.
struct Labels {
  const float* data;
  std::int64_t stride[3];
};

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
std::int64_t StatisticsStreams(const Batch& batch);

struct Options {
  const Kernels* kernels;
  int threads;
};

// out [S, B, F] and statistics, compact. With a noising the labels batch.y are made first, from the
// guidance as prior, into memory that noising.y and batch.y both are.
void Forward(const Layer& layer, const Batch& batch, const Noising& noising, const Running& running,
             const Options& options, float* statistics, float* out);

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

// From grad [S, B, F], whose elements of a row are side by side, and Forward's statistics.
void Backward(const Layer& layer, const Batch& batch, const float* grad,
              const std::int64_t (&grad_stride)[2], const float* statistics, const Options& options,
              const Gradients& gradients);

}  // namespace diffmic::cpu::conditioning

#endif  // DIFFMIC_CPU_CONDITIONING_CONDITIONING_H_
