// The reverse chain on a GPU, for few rows. The definition is diffmic_fast/reference/denoise.py;
// results differ from it by the order of float32 sums, and by the roundings of bfloat16 and float8.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_H_
#define DIFFMIC_CUDA_DENOISE_DENOISE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "include/denoise_call.h"

namespace diffmic::cuda::denoise {

// The launch configuration of a chain, determined by the arguments of Plan.
struct Shape {
  int blocks;           // one per multiprocessor, all resident
  int row_tiles;        // tiles of 8 rows: 1, 2, 4 or 8
  int pass_tiles;       // tiles of 16 output channels per pass over the activations
  int step_stages;      // stages of weights that a block reads per sweep
  int slots;            // of these, how many shared memory holds at once
  int resident;         // the stages that remain there for all sweeps; others share a ring of slots
  int shared_channels;  // output channels of a block whose records are in shared memory, or 0
  int chains, window;   // rows per launch: chains x steps of each per sweep
  int channels_at;      // byte offset of these records in shared memory
  int state_at;         // byte offset of the chains' states there
  std::size_t shared_bytes;
  std::size_t workspace_bytes;
};

// Limits of the kernel.
inline constexpr std::int64_t kMostClasses = 512;
inline constexpr std::int64_t kMostFeatures = 1 << 16;

// `window`: the most steps of a chain per sweep, at least 1; reduced if the rows do not fit. Throws
// Error if the device has too little shared memory for the kernel.
Shape Plan(std::int64_t features, std::int64_t classes, std::int64_t rows, std::int64_t steps,
           std::int64_t window, Precision precision);

// A run over all rows as a sequence of launches. `workspace`: Shape::workspace_bytes bytes, aligned
// to 256. The arguments must not change until the last launch has ended.
class Run {
 public:
  // `sweeps`: the most sweeps of a launch, which bounds its time.
  Run(const DenoiseCall& call, const Shape& shape, std::int64_t sweeps, void* workspace,
      cudaStream_t stream);

  // Enqueues a launch, without synchronising; returns whether more may be needed.
  bool Next();

  // Synchronises the stream; returns the steps done, of rows * steps in total.
  std::int64_t Wait() const;

 private:
  DenoiseCall call_;
  Shape shape_;
  std::int64_t launch_sweeps_;
  unsigned char* workspace_;
  cudaStream_t stream_;
  bool packed_ = false;
  std::int64_t row_ = 0;     // first row of the current launches
  std::int64_t sweeps_ = 0;  // sweeps enqueued for them
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_H_
