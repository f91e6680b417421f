// The persistent kernel of `denoise` (docs/algorithm.md, "Denoiser" and "Sampling"). One
// cooperative launch computes many steps of the reverse chains of up to 64 rows.
//
// A sweep, by all thread blocks (one per multiprocessor, each with its share of the tiles of 16
// output channels):
//   1. first layer: a block computes h1 of its tiles and writes it to global memory (L2)
//   2. first hidden product: a block computes h2 of its tiles from all of h1 and writes it likewise
//   3. second hidden product: h3 of its tiles stays in registers; a block writes only its partial
//      sums of the last product, eps [rows, C]
//   4. every block adds the partial sums in the same order and updates its own copy of the states
//   in
//      shared memory (denoise_chains.cuh), so no block waits for the result
// A grid barrier follows each of 1 to 3.
//
// The bound is memory bandwidth: both weights are read once per sweep and used for few rows. For
// F = 6144 in bfloat16 these are 151 MB, 45 us at 3.35 TB/s; 2 * 32 * 75.5 M operations take 5 us
// on the tensor cores of an H100. The weight pipeline (denoise_weights.cuh) therefore keeps as many
// stages in flight as shared memory holds, across barriers and sweeps. Activations come from L2:
// rows * F * 2 or 4 bytes per product and block.
//
// The order of a sum is fixed: within a warp's eighth of the depth, over the eighths, over the
// tiles of a block, over the blocks. A row's bits depend on the number of blocks, that is on the
// device, and not on other rows.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/grid_barrier.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softplus.cuh"
#include "cuda/denoise/denoise_arguments.h"
#include "cuda/denoise/denoise_chains.cuh"
#include "cuda/denoise/denoise_layout.cuh"
#include "cuda/denoise/denoise_weights.cuh"

namespace diffmic::cuda::denoise {

// The work of a thread block; the kernel calls Main.
template <class Product>
class Block {
 public:
  static constexpr int kRowTiles = Product::kRows;
  static constexpr int kAhead = Ahead(kRowTiles);
  static constexpr int kActivationRing = kAhead * kWarps * kRowTiles * kActivationBytes;
  static constexpr int kSums = kWarps * kRowTiles * kTileUnits * kTileRows;  // of one tile
  static_assert(2 * kSums * 4 <= kActivationRing);

  __device__ explicit Block(const KernelArguments& a)
      : a_(a),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_tile_(TileOf(blockIdx.x)),
        tiles_(TileOf(blockIdx.x + 1) - first_tile_),
        barrier_(a.counter),
        ring_(dynamic_shared),
        slots_(reinterpret_cast<uint4*>(dynamic_shared + kActivationRing) +
               std::int64_t{warp_} * a.slots * a.pass_tiles * Product::kPieces * kPiece),
        chains_(a,
                dynamic_shared + kActivationRing +
                    std::int64_t{kWarps} * a.slots * a.pass_tiles * Product::kPieces * kPiece * 16),
        weights_(a, slots_, first_tile_, tiles_, warp_, lane_) {}

  __device__ void Main() {
    weights_.Begin();
    chains_.Load();
    bool moved = false;
    for (int sweep = 0; sweep < a_.sweeps; ++sweep) {
      if (chains_.Finished()) break;
      moved = true;
      chains_.PlaceRows();
      Condition();
      barrier_.Sync();
      Multiply(0);
      barrier_.Sync();
      ClearEps();
      Multiply(1);
      WriteParts();
      barrier_.Arrive();
      chains_.DrawNoise();
      barrier_.Wait();
      SumParts();
      chains_.Walk();
    }
    // Without a sweep there was no grid barrier: another block may not have loaded this state yet.
    if (moved) chains_.Save();
    WaitCopies<0>();
  }

 private:
  __device__ int TileOf(unsigned block) const {
    return static_cast<int>(std::int64_t{a_.unit_tiles} * block / gridDim.x);
  }

  // ---- layers --------------------------------------------------------------------------------

  // The conditional layer after its matrix product `sum`. `affine` holds the bias, BatchNorm and
  // the quantisation scale (PackWeights).
  __device__ float Activate(int layer, int unit, int row, float sum) const {
    const ConditionalLayer& weights = a_.call.weights.layers[layer];
    const float4 affine = a_.affine[layer * a_.unit_tiles * kTileUnits + unit];
    const float gamma = weights.gamma[chains_.timestep(row) * weights.gamma_stride + unit];
    return Softplus(fmaf(gamma * affine.x, fmaf(sum, affine.w, affine.y), affine.z));
  }

  // h1 of the block's tiles. A warp computes one tile at a time, four elements per lane.
  __device__ void Condition() {
    const int classes = a_.classes;
    for (int item = warp_; item < tiles_ * kRowTiles; item += kWarps) {
      const int tile = first_tile_ + item / kRowTiles;
      const int j = item % kRowTiles;
      const int row = j * kTileRows + lane_ / 4;
      float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < chains_.rows()) {
        const int chain = row / a_.window;
        const float* x = a_.call.features + (a_.first_row + chain) * a_.call.features_stride;
        const float* y = chains_.y(row);
        const float* guidance = chains_.guidance(row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int unit = tile * kTileUnits + LaneUnit(lane_, i);
          if (unit >= a_.features) continue;
          const ConditionalLayer& layer = a_.call.weights.layers[0];
          const float* w = layer.weight + unit * layer.weight_stride[0];
          float sum = 0.0f;
          for (int c = 0; c < classes; ++c) sum = fmaf(w[c], y[c], sum);
          for (int c = 0; c < classes; ++c) sum = fmaf(w[classes + c], guidance[c], sum);
          h[i] = x[unit] * Activate(0, unit, row, sum);
        }
      }
      Product::StoreActivations(a_.activations[0], tile, j, lane_, h);
    }
  }

  // Starts the copies of a stage of this warp's activations into the ring, as one group.
  __device__ void CopyActivations(const unsigned char* from, int stage) {
    if (stage < a_.stages) {
      const std::int64_t bytes = kRowTiles * kActivationBytes;
      const auto* source =
          reinterpret_cast<const uint4*>(from + (warp_ * a_.stages + stage) * bytes) + lane_;
      auto* to = reinterpret_cast<uint4*>(RingPlace(stage)) + lane_;
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) CopyAsync16(to + j * kPiece, source + j * kPiece);
    }
    CommitCopies();
  }

  __device__ unsigned char* RingPlace(int stage) const {
    return ring_ + (warp_ * kAhead + stage % kAhead) * kRowTiles * kActivationBytes;
  }

  // A hidden layer of the block's tiles.
  __device__ void Multiply(int product) {
    for (int pass = 0; pass < weights_.passes(); ++pass) {
      const int tiles = weights_.PassTiles(pass);
      Product sums;
      sums.Clear();
      for (int stage = 0; stage < kAhead; ++stage) {
        CopyActivations(a_.activations[product], stage);
      }
      for (int stage = 0; stage < a_.stages; ++stage) {
        // Groups complete in order: this wait covers the stage's activations and the weights, whose
        // copies were committed before or with them.
        WaitCopies<kAhead - 1>();
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        sums.Multiply(weights_.Stage(), RingPlace(stage), tiles, lane_);
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        weights_.Release();
        CopyActivations(a_.activations[product], stage + kAhead);
      }
      __syncthreads();  // the ring has been read; it now holds the sums of tiles
      for (int i = 0; i < tiles; ++i) {
        const int tile = first_tile_ + pass * a_.pass_tiles + i;
        float* all = reinterpret_cast<float*>(ring_) + i % 2 * kSums;
        sums.Store(i, all + warp_ * (kSums / kWarps), lane_);
        __syncthreads();
        // Meanwhile the next tile's sums are stored to the other half of the ring.
        if (warp_ < kRowTiles) FinishTile(product, tile, all);
      }
      __syncthreads();  // the sums have been read; the next pass may overwrite the ring
    }
  }

  // Adds the warps' sums of a tile for row tile `warp` and applies the rest of the layer.
  __device__ void FinishTile(int product, int tile, const float* all) {
    const int row = warp_ * kTileRows + lane_ / 4;
    float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = LaneUnit(lane_, i);
      const float* from = all + (warp_ * kTileUnits + SumPosition(unit)) * kTileRows + lane_ / 4;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += from[warp * (kSums / kWarps)];
      if (row < chains_.rows() && tile * kTileUnits + unit < a_.features) {
        h[i] = Activate(product + 1, tile * kTileUnits + unit, row, sum);
      }
    }
    if (product == 0) {
      Product::StoreActivations(a_.activations[1], tile, warp_, lane_, h);
    } else {
      AccumulateEps(tile, row, h);
    }
  }

  // ---- the last product ----------------------------------------------------------------------

  __device__ void ClearEps() {
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads)
      chains_.eps()[i] = 0.0f;
    __syncthreads();
  }

  // Accumulates a tile's contribution to eps. A row belongs to one warp, so there is no concurrent
  // update; its four lanes are reduced by shuffles.
  __device__ void AccumulateEps(int tile, int row, const float (&h)[4]) {
    for (int c = 0; c < a_.classes; ++c) {
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = tile * kTileUnits + LaneUnit(lane_, i);
        if (unit < a_.features) {
          part = fmaf(a_.call.weights.output_weight[c * a_.call.weights.output_stride + unit], h[i],
                      part);
        }
      }
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 1);
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 2);
      if (lane_ % 4 == 0 && row < chains_.rows()) chains_.eps()[row * a_.classes + c] += part;
    }
  }

  // Writes the block's partial sums of eps.
  __device__ void WriteParts() {
    __syncthreads();
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads) {
      a_.parts[std::int64_t{i} * gridDim.x + blockIdx.x] = chains_.eps()[i];
    }
  }

  // eps of all rows from the partial sums of all blocks, which are read past the L1 cache.
  __device__ void SumParts() {
    for (int i = warp_; i < chains_.rows() * a_.classes; i += kWarps) {
      const float* parts = a_.parts + std::int64_t{i} * gridDim.x;
      float sum = 0.0f;
      for (unsigned block = lane_; block < gridDim.x; block += 32) {
        sum += __ldcg(parts + block);
      }
      sum = WarpReduce(sum, [](float a, float b) { return a + b; });
      if (lane_ == 0) chains_.eps()[i] = sum + a_.call.weights.output_bias[i % a_.classes];
    }
    __syncthreads();
  }

  const KernelArguments& a_;
  int warp_, lane_, first_tile_, tiles_;
  GridBarrier barrier_;
  unsigned char* ring_;
  uint4* slots_;
  Chains chains_;
  WeightPipeline<Product::kPieces> weights_;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_
