// The persistent kernel of `denoise`. One launch walks many steps of a chain over up to 64 rows.
//
// A step, by all blocks together (one a multiprocessor, all resident):
//   1. conditioning: each block makes h1 of its own tiles of 16 units     -> global memory, L2
//   2. first hidden product: each block for its tiles, from all of h1; h2 -> global memory, L2
//   3. second hidden product; h3 never leaves its registers: a block's part of the last product,
//      eps [rows, C], is all that it tells the others
//   4. every block adds the parts in the same order and moves the state, which each keeps in its
//      own shared memory: no block ever waits for a result of step 4.
// Three grid barriers a step, one behind each of 1 to 3.
//
// What bounds it: the two weights are read once a step and used for a few rows only (F = 6144,
// bfloat16: 151 MB, 45 us at 3.35 TB/s; 2 * 32 * 75.5 M operations are 5 us of an H100's tensor
// cores). They do not depend on anything computed, so their copies run ahead, through barriers and
// steps, as far as shared memory goes: `slots` stages a warp, of which the first `resident` of a
// step are never given up. Each lane copies the very bytes that it will multiply, so that this
// stream needs no barrier but its own waits. Activations come from L2: rows * F * 2 or 4 bytes a
// product and block.
//
// Windows: rows may be several steps of one chain (denoise_chains.cuh).
//
// Sums are in one order: a warp's eighth of the depth, the eighths, the tiles of a block, the
// blocks. A row's bits depend on the number of blocks, which is the device's, not on other rows.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/grid_barrier.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/softplus.cuh"
#include "cuda/denoise/denoise_arguments.h"
#include "cuda/denoise/denoise_chains.cuh"
#include "cuda/denoise/denoise_layout.cuh"
#include "cuda/denoise/denoise_stream.cuh"

namespace diffmic::cuda::denoise {

// Everything a block does; the kernel is its Main.
template <class Product>
class Block {
 public:
  static constexpr int kRowTiles = Product::kRows;
  static constexpr int kAhead = Ahead(kRowTiles);
  static constexpr int kActivationRing = kAhead * kWarps * kRowTiles * kActivationBytes;
  static constexpr int kSums = kWarps * kRowTiles * kTileUnits * kTileRows;  // of a tile
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
        stream_(a, slots_, first_tile_, tiles_, warp_, lane_) {}

  __device__ void Main() {
    stream_.Begin();
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
      TellEps();
      barrier_.Arrive();
      chains_.DrawNoise();
      barrier_.Wait();
      AddEps();
      chains_.Walk();
    }
    // Where there was nothing to do, no barrier says that all blocks have loaded what this writes.
    if (moved) chains_.Save();
    WaitCopies<0>();
  }

 private:
  __device__ int TileOf(unsigned block) const {
    return static_cast<int>(std::int64_t{a_.unit_tiles} * block / gridDim.x);
  }

  // ---- layers --------------------------------------------------------------------------------

  // softplus of the conditional layer around `sum`; gain, bias, offset and scale hold BatchNorm
  // and what the weights were divided by.
  __device__ float Activate(int layer, int unit, int row, float sum) const {
    const ConditionalLayer& weights = a_.call.weights.layers[layer];
    const float4 affine = a_.affine[layer * a_.unit_tiles * kTileUnits + unit];
    const float gamma = weights.gamma[chains_.timestep(row) * weights.gamma_stride + unit];
    return Softplus(fmaf(gamma * affine.x, fmaf(sum, affine.w, affine.y), affine.z));
  }

  // h1 of the block's tiles. A warp makes 16 units of 8 rows at a time, four a lane.
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

  // Stage `stage` of this warp's activations, into its place of the ring; a group of copies.
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

  // A hidden layer, for the block's tiles.
  __device__ void Multiply(int product) {
    for (int pass = 0; pass < stream_.passes(); ++pass) {
      const int tiles = stream_.PassTiles(pass);
      Product sums;
      sums.Clear();
      for (int stage = 0; stage < kAhead; ++stage) {
        CopyActivations(a_.activations[product], stage);
      }
      for (int stage = 0; stage < a_.stages; ++stage) {
        // The copies end in the order in which they began: these activations, and all weights that
        // were asked for before them.
        WaitCopies<kAhead - 1>();
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        sums.Multiply(stream_.Stage(), RingPlace(stage), tiles, lane_);
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        stream_.Release();
        CopyActivations(a_.activations[product], stage + kAhead);
      }
      __syncthreads();  // the ring is read, and holds the tiles' sums from here on
      for (int i = 0; i < tiles; ++i) {
        const int tile = first_tile_ + pass * a_.pass_tiles + i;
        float* all = reinterpret_cast<float*>(ring_) + i % 2 * kSums;
        sums.Store(i, all + warp_ * (kSums / kWarps), lane_);
        __syncthreads();
        // The other half of the ring is free for the next tile meanwhile.
        if (warp_ < kRowTiles) FinishTile(product, tile, all);
      }
      __syncthreads();  // before the next pass takes the ring
    }
  }

  // Adds the warps' sums of a tile, in row tile `warp`, and makes activations of them.
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
      AddToEps(tile, row, h);
    }
  }

  // ---- the last product ----------------------------------------------------------------------

  __device__ void ClearEps() {
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads)
      chains_.eps()[i] = 0.0f;
    __syncthreads();
  }

  // The tile's part of eps. The four lanes of a row are added; a row belongs to one warp, so that
  // nothing else is added at the same time.
  __device__ void AddToEps(int tile, int row, const float (&h)[4]) {
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

  __device__ void TellEps() {
    __syncthreads();
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads) {
      a_.parts[std::int64_t{i} * gridDim.x + blockIdx.x] = chains_.eps()[i];
    }
  }

  // eps of all rows, from all blocks, by each.
  __device__ void AddEps() {
    for (int i = warp_; i < chains_.rows() * a_.classes; i += kWarps) {
      const float* parts = a_.parts + std::int64_t{i} * gridDim.x;
      float sum = 0.0f;
      for (unsigned block = lane_; block < gridDim.x; block += 32) {
        sum += LoadSharedFloat(parts + block);
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
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
  WeightStream<Product::kPieces> stream_;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_
