// The arguments of the persistent kernel of `denoise`.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_ARGUMENTS_H_
#define DIFFMIC_CUDA_DENOISE_DENOISE_ARGUMENTS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/denoise/denoise.h"

namespace diffmic::cuda::denoise {

struct KernelArguments {
  int features, classes, unit_tiles, stages, pass_tiles, slots, resident;
  const uint4* packed;
  const float* channels;      // [16 unit_tiles, ChannelStride]
  int shared_channels;        // channels whose records a block copies to shared memory; 0: none
  int channels_at, state_at;  // byte offsets of the records and of BlockState in shared memory
  DenoiseCall call;           // all rows; the launch computes `chains` of them from first_row on
  std::int64_t first_row;
  int chains, window;
  bool fresh;  // this is the first launch of its chains
  int sweeps;

  // State between launches: the first unfinished step of each chain, and its window's states.
  int* begin;     // [chains]
  float* states;  // [chains * window, C]

  unsigned char* activations[2];  // h1 and h2
  float4* parts;                  // [blocks, part_quads]: each block's summands of eps
  int part_quads;                 // ceil(chains * window * C / 4)
  std::uint32_t* counter;         // of the grid barrier, zero
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_ARGUMENTS_H_
