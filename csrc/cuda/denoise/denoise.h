// The reverse chain on a GPU, for few rows. The definition is diffmic_fast/reference/denoise.py;
// the numbers are its own up to the order of float32 sums (and the roundings of bfloat16).
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_H_
#define DIFFMIC_CUDA_DENOISE_DENOISE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "include/denoise_call.h"

namespace diffmic::cuda::denoise {

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

// One run over all rows, in memory of Shape's workspace_bytes at a multiple of 256 bytes, as a
// sequence of launches: each Next enqueues one and returns, without waiting, whether there may be
// more to do. The arguments stay as they are until the last has run.
class Run {
 public:
  // `sweeps`: the most sweeps of a launch, which bounds its time.
  Run(const DenoiseCall& call, const Shape& shape, std::int64_t sweeps, void* workspace,
      cudaStream_t stream);

  bool Next();

  // Waits for what is enqueued; the steps that are done, of rows * steps in all.
  std::int64_t Wait() const;

 private:
  DenoiseCall call_;
  Shape shape_;
  std::int64_t launch_sweeps_;
  unsigned char* workspace_;
  cudaStream_t stream_;
  bool packed_ = false;
  std::int64_t row_ = 0;     // first row of the present launches
  std::int64_t sweeps_ = 0;  // evaluations enqueued for them
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_H_
