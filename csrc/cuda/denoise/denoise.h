// The reverse chain on a GPU, for few rows. The definition is diffmic_fast/reference/denoise.py;
// the numbers are its own up to the order of float32 sums (and the roundings of bfloat16).
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_H_
#define DIFFMIC_CUDA_DENOISE_DENOISE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace diffmic::cuda::denoise {

// Of the two hidden products: weights and activations in float32; both in bfloat16; weights in
// float8 (e4m3, with one scale a unit) and activations in bfloat16. Sums are float32 always.
enum class Precision { kFloat32, kBFloat16, kFloat8 };

// A conditional layer as the model holds it; strides in elements, rows of unit stride.
struct Layer {
  const float* weight;  // [F, 2 C] or [F, F]
  std::int64_t weight_stride;
  const float* bias;   // [F]
  const float* gamma;  // [T + 1, F]
  std::int64_t gamma_stride;
  const float* norm_weight;
  const float* norm_bias;
  const float* running_mean;
  const float* running_var;
  float eps;
};

struct Weights {
  std::int64_t features, classes;
  Layer layers[3];
  const float* output_weight;  // [C, F]
  std::int64_t output_stride;
  const float* output_bias;  // [C]
};

// The sampler's n steps; see StepTable in the definition. All on the device.
struct Steps {
  std::int64_t count;
  const std::int64_t* timesteps;  // [n]
  const float* table;  // [7, n]: s, q, y0_weight, y_weight, prior_weight, eps_weight, sigma
  std::int64_t start;
};

struct Chain {
  std::int64_t rows;
  const float* features;  // [rows, F]
  std::int64_t features_stride;
  const float* prior;     // compact [rows, C]
  const float* guidance;  // compact [rows, C]
  const float* noise;     // compact [n, rows, C], or NULL: Philox by the keys below
  std::uint64_t seed;
  const std::int64_t* images;   // [rows]
  const std::int64_t* samples;  // [rows]
  float* out;                   // compact [rows, C]
  float* trajectory;            // compact [n + 1, rows, C], or NULL
};

// How a chain is laid on a device. It follows from the arguments of Plan alone.
struct Shape {
  int blocks;          // of a launch, one a multiprocessor, all resident
  int row_tiles;       // of 8 rows: 1, 2, 4 or 8
  int pass_tiles;      // of 16 units: what a block computes from one reading of the activations
  int slots;           // stages of weights in shared memory
  int resident;        // of them those that stay there over the steps
  int chains, window;  // rows of a launch: chains, times the steps of each that are taken at once
  std::size_t shared_bytes;
  std::size_t workspace_bytes;
};

// Most classes and features that the kernel takes.
inline constexpr std::int64_t kMostClasses = 512;
inline constexpr std::int64_t kMostFeatures = 1 << 16;

// `window`: the most steps of a chain that may be taken at once, 1 or more; fewer where the rows do
// not fit. Throws Error where the device cannot hold the kernel.
Shape Plan(std::int64_t features, std::int64_t classes, std::int64_t rows, std::int64_t steps,
           std::int64_t window, Precision precision);

struct Options {
  Precision precision = Precision::kFloat32;
  float tolerance = 0.0f;
  std::int64_t sweeps = 64;  // the most evaluations of a launch: bounds its time
};

// One run over all rows, in memory of Shape's workspace_bytes at a multiple of 256 bytes, as a
// sequence of launches: each Next enqueues one and returns, without waiting, whether there may be
// more to do. The arguments stay as they are until the last has run.
class Run {
 public:
  Run(const Weights& weights, const Steps& steps, const Chain& chain, const Shape& shape,
      const Options& options, void* workspace, cudaStream_t stream);

  bool Next();

  // Waits for what is enqueued; the steps that are done, of rows * steps in all.
  std::int64_t Wait() const;

 private:
  Weights weights_;
  Steps steps_;
  Chain chain_;
  Shape shape_;
  Options options_;
  unsigned char* workspace_;
  cudaStream_t stream_;
  bool packed_ = false;
  std::int64_t row_ = 0;     // first row of the present launches
  std::int64_t sweeps_ = 0;  // evaluations enqueued for them
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_H_
