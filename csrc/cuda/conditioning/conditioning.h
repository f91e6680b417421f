// The denoiser's first layer on a GPU. The definition is diffmic_fast/reference/conditioning.py,
// the arguments and the formulas are in include/conditioning_call.h.
//
// Work distribution. An output channel depends on no other one: a block takes a slice of kSlice
// channels with all branches and all rows, so that batch statistics stay inside it, and x, gradient
// and result are transferred once. A row of a slice is 128 bytes, read by 8 threads of four
// channels each, 32 rows side by side. Labels, weights and the products of a tile of rows are in
// shared memory:
//   forward   eval: a block per slice and tile; one kernel
//             training: if all rows fit into one tile (some 150 for three branches), one kernel
//             does all; otherwise one kernel takes the moments, tile after tile, and that of the
//             eval mode does the rest
//   backward  the same if all rows are one tile (some 75 for three branches, any number in eval
//             mode); otherwise the block goes through its tiles twice, first for the sums over rows
//             that the batch statistics pass back. Gradients of labels are sums over all channels:
//             each block writes its own to the workspace, and a second kernel adds them up.
// Noisy labels may be made here too (noising.h): by each block for its own use, and written by
// those of the first slice. One more float64 Philox and Box-Muller per block replaces one or more
// launches and a round trip to memory. All sums have one order for any alignment and device:
// results are reproducible, and in eval mode batch-invariant.
//
// Kept for the backward pass: mean and variance, [2, S, F] floats.
//
// Arithmetic, S = 3, B = 32, C = 5, F = 6144, an element being one of the S B F = 590 000:
//   forward: x, the rows of gamma, W, h1 and eight arrays of F once each, 4.5 MB; the labels,
//     3.8 KB, by each of 192 blocks, from the second-level cache: 0.7 MB. 60 operations per
//     element.
//   backward: these, the gradient of h1, and what is written, 6.2 MB; gradients of labels
//     another 0.7 MB each way, inside the second-level cache. 110 operations per element.
// At 3.35 TB/s that is 1.4 and 1.9 us, less than a launch costs. Larger batches are bound by
// memory.
#ifndef DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_
#define DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "include/conditioning_call.h"

namespace diffmic::cuda::conditioning {

using namespace diffmic::conditioning;

inline constexpr int kSlice = 32;  // output channels of a block

void Forward(const ForwardCall& call, cudaStream_t stream);

// Floats of workspace for Backward with gradients of labels.
std::int64_t LabelSums(std::int64_t features, std::int64_t streams, std::int64_t rows,
                       std::int64_t classes);

void Backward(const BackwardCall& call, float* workspace, cudaStream_t stream);

}  // namespace diffmic::cuda::conditioning

#endif  // DIFFMIC_CUDA_CONDITIONING_CONDITIONING_H_
