// Memory layout of `denoise`: the packed weights, the activations between two matrix products, and
// the partial sums of a thread block.
//
// A tile is 16 output channels (rows of the weight) by 8 batch rows. The depth of a product is
// split among the 8 warps of a block, and a warp iterates over its share in stages of 16 columns
// (float32) or 32 (bfloat16, float8): 1024 bytes of weights per tile, 512 in float8. In a stage
// each lane owns two pieces of 16 bytes of a tile, one in float8. It copies them to shared memory
// and reads them itself, so the weights need no barrier.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_LAYOUT_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_LAYOUT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/denoise/denoise.h"

namespace diffmic::cuda::denoise {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTileUnits = 16;
inline constexpr int kTileRows = 8;
inline constexpr int kMostPassTiles = 4;
inline constexpr int kPiece = 32;             // in uint4: one copy of a warp, 16 bytes per lane
inline constexpr int kActivationBytes = 512;  // a stage of 8 rows
inline constexpr int kMostLabels = 512;       // rows x classes of a launch
static_assert(kMostLabels >= kMostClasses);

__host__ __device__ constexpr int StageDepth(Precision precision) {
  return precision == Precision::kFloat32 ? 16 : 32;
}
// Pieces per tile and stage.
__host__ __device__ constexpr int StagePieces(Precision precision) {
  return precision == Precision::kFloat8 ? 1 : 2;
}
__host__ __device__ constexpr int UnitTiles(std::int64_t features) {
  return static_cast<int>((features + kTileUnits - 1) / kTileUnits);
}
// Stages of a warp per product. Columns beyond the last feature are zero.
__host__ __device__ constexpr int Stages(std::int64_t features, Precision precision) {
  const int depth = kWarps * StageDepth(precision);
  return static_cast<int>((features + depth - 1) / depth);
}

// Pipeline depth of the activations: hides the latency of the L2 cache, uses shared memory.
__host__ __device__ constexpr int Ahead(int row_tiles) { return row_tiles < 8 ? 4 : 2; }

// Packed weights are [product][tile][warp][stage][piece], with pieces of 32 x 16 bytes.
__host__ __device__ constexpr std::int64_t StageIndex(int unit_tiles, int stages, int product,
                                                      int tile, int warp, int stage) {
  return ((std::int64_t{product} * unit_tiles + tile) * kWarps + warp) * stages + stage;
}

// The position of an output channel in a warp's sums of a tile, [16, 8 rows]. This permutation
// makes both the writes of fragments (channels g, rows 2t and 2t + 1) and the reads (channels 2t of
// all t, one row) free of bank conflicts.
__device__ __forceinline__ int SumPosition(int unit) {
  const int odd = unit & 1;
  return (((unit >> 1) & 3) ^ (odd << 1)) + 4 * odd + (unit & 8);
}

// The output channels i < 4 of a tile that a lane computes for row lane / 4: those of its operand
// fragment in the next product.
__device__ __forceinline__ int LaneUnit(int lane, int i) {
  return 2 * (lane & 3) + (i & 1) + 8 * (i >> 1);
}

// The record of an output channel, what it needs besides its hidden weights, in floats:
//   gain, bias, offset and scale of each of the three layers; the row of the first weight, [2 C];
//   the column of the last weight, [C]
// A layer is softplus(gamma_t gain (sum scale + bias) + offset), where scale is 1 except for float8
// weights. The stride is an odd multiple of 4 floats, free of bank conflicts for LaneUnit.
inline constexpr int kAffine = 4;  // gain, bias, offset, scale
inline constexpr int kScale = 3;
inline constexpr int kFirstWeight = 3 * kAffine;
__host__ __device__ constexpr int ChannelStride(int classes) {
  return 4 * ((kFirstWeight + 3 * classes + 3) / 4 | 1);
}

// Writes both hidden weights to `packed` and the records of all channels to `channels`,
// [16 UnitTiles, ChannelStride], zero beyond the last feature.
void PackWeights(const DenoiserWeights& weights, Precision precision, uint4* packed,
                 float* channels, cudaStream_t stream);

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_LAYOUT_CUH_
