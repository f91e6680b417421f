// Where the numbers of `denoise` lie: the packed weights, the activations between two products, and
// the partial sums of a block.
//
// A product computes units (rows of the weight) of 16, a tile, over batch rows of 8. Its depth is
// split among the 8 warps of a block, and a warp walks its part in stages: 16 columns of float32
// or 32 of the narrower types, 1024 bytes of weights a tile or, of float8, 512. In a stage every
// lane owns two pieces of 16 bytes of a tile, or one, which it copies to shared memory itself and
// reads back itself, so that weights need no barrier.
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
inline constexpr int kPiece = 32;             // 16 bytes a lane: what a warp copies at once
inline constexpr int kActivationBytes = 512;  // of a stage, 8 rows

__host__ __device__ constexpr int StageDepth(Precision precision) {
  return precision == Precision::kFloat32 ? 16 : 32;
}
// Pieces of a tile's weights in a stage.
__host__ __device__ constexpr int StagePieces(Precision precision) {
  return precision == Precision::kFloat8 ? 1 : 2;
}
__host__ __device__ constexpr int UnitTiles(std::int64_t features) {
  return static_cast<int>((features + kTileUnits - 1) / kTileUnits);
}
// Stages of a warp in a product. What lies beyond the last feature is zero.
__host__ __device__ constexpr int Stages(std::int64_t features, Precision precision) {
  const int depth = kWarps * StageDepth(precision);
  return static_cast<int>((features + depth - 1) / depth);
}

// Stages of activations under way: deeper needs more memory and hides more of L2's latency.
__host__ __device__ constexpr int Ahead(int row_tiles) { return row_tiles < 8 ? 4 : 2; }

// The packed weights are pieces of 32 x 16 bytes in the order [product][tile][warp][stage][piece].
__host__ __device__ constexpr std::int64_t StageIndex(int unit_tiles, int stages, int product,
                                                      int tile, int warp, int stage) {
  return ((std::int64_t{product} * unit_tiles + tile) * kWarps + warp) * stages + stage;
}

// The sums of a tile over 8 rows, by one warp: 16 units of 8 rows each, in this order. It is chosen
// so that neither the writing of fragments (units g, rows 2t, 2t + 1) nor their reading (units 2t
// of all t, one row) meets a bank twice.
__device__ __forceinline__ int SumPosition(int unit) {
  const int odd = unit & 1;
  return (((unit >> 1) & 3) ^ (odd << 1)) + 4 * odd + (unit & 8);
}

// The units of a tile that a lane turns into activations, for row lane / 4: those of the fragment
// which it then holds of them as the next product's operand.
__device__ __forceinline__ int LaneUnit(int lane, int i) {
  return 2 * (lane & 3) + (i & 1) + 8 * (i >> 1);
}

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_LAYOUT_CUH_
