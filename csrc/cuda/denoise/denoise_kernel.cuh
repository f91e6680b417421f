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
//      in shared memory (denoise_chains.cuh), so no block waits for the result
// A grid barrier follows each of 1 to 3.
//
// The bound is memory bandwidth: both weights are read once per sweep and used for few rows. For
// F = 6144 in bfloat16 these are 151 MB, 45 us at 3.35 TB/s; 2 * 32 * 75.5 M operations take 5 us
// on the tensor cores of an H100. The weight pipeline (denoise_weights.cuh) therefore keeps as many
// stages in flight as shared memory holds, across barriers and sweeps. Activations come from L2:
// rows * F * 2 or 4 bytes per product and block.
//
// What is not streamed costs latency, of which the copies in flight hide a part. A block therefore
// keeps the records of its channels, the steps and the noise in shared memory, prefetches gamma
// into the L2 cache, and issues loads together (docs/kernels/denoise.md, "Time on paper").
//
// The order of a sum is fixed: within a warp's eighth of the depth, over the eighths, over the
// tiles of a block, over the blocks of each sixteenth of the grid, over these sixteenths; the first
// block's sum begins with the bias. A row's bits depend on the number of blocks, that is on the
// device, and not on other rows.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/grid_barrier.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/loads.cuh"
#include "cuda/common/ptx.cuh"
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
  static constexpr int kPrefetched = 2;  // stages before its end, a product prefetches gamma
  static constexpr int kActivationRing = kAhead * kWarps * kRowTiles * kActivationBytes;
  static constexpr int kSums = kWarps * kRowTiles * kTileUnits * kTileRows;  // of one tile
  static_assert(2 * kSums * 4 <= kActivationRing);
  static_assert(kWarps * kMostLabels * 4 <= kActivationRing);  // SumParts

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
        chains_(a, dynamic_shared + a.state_at),
        weights_(a, slots_, first_tile_, tiles_, warp_, lane_) {}

  __device__ void Main() {
    weights_.Begin();
    LoadChannels();
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
      chains_.LoadSteps();
      PrefetchFirstLayer();
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

  // Copies the records of the block's channels to shared memory, if they have a place there.
  // chains_.Load ends with a barrier.
  __device__ void LoadChannels() {
    if (a_.shared_channels == 0) return;
    const int quads = tiles_ * kTileUnits * ChannelStride(a_.classes) / 4;
    auto* to = reinterpret_cast<float4*>(dynamic_shared + a_.channels_at);
    const auto* from = reinterpret_cast<const float4*>(a_.channels) +
                       std::int64_t{first_tile_} * kTileUnits * ChannelStride(a_.classes) / 4;
    for (int i = threadIdx.x; i < quads; i += kThreads) to[i] = from[i];
  }

  // The record of an output channel of the block (ChannelStride).
  __device__ const float* Record(int unit) const {
    const int stride = ChannelStride(a_.classes);
    if (a_.shared_channels == 0) return a_.channels + std::int64_t{unit} * stride;
    return reinterpret_cast<const float*>(dynamic_shared + a_.channels_at) +
           (unit - first_tile_ * kTileUnits) * stride;
  }

  // Brings the values of the block's channels from an array [F] to the L2 cache: `thread` of
  // Lines() its lines of 128 bytes, the last of which may be one that has been brought.
  __device__ void Prefetch(const float* from, int thread) const {
    const int first = first_tile_ * kTileUnits;
    const int units = min(a_.features - first, tiles_ * kTileUnits);
    PrefetchL2(from + first + min(32 * thread, units - 1));
  }

  __device__ int Lines() const { return (tiles_ * kTileUnits + 31) / 32 + 1; }

  // The features, and gamma of the first layer for the steps that the next sweep may evaluate.
  __device__ void PrefetchFirstLayer() const {
    const int lines = Lines();
    const ConditionalLayer& layer = a_.call.weights.layers[0];
    chains_.EachNextTimestep(lines, [&](int timestep, int thread) {
      Prefetch(layer.gamma + timestep * layer.gamma_stride, thread);
    });
    for (int i = threadIdx.x; i < a_.chains * lines; i += kThreads) {
      Prefetch(a_.call.features + (a_.first_row + i / lines) * a_.call.features_stride, i % lines);
    }
  }

  // gamma of a hidden layer, shortly before it is used: weights of half a step evict it.
  __device__ void PrefetchGamma(int layer) const {
    const int lines = Lines();
    const ConditionalLayer& weights = a_.call.weights.layers[layer];
    // With one step per sweep all rows are at the same one.
    const int rows = a_.window == 1 ? 1 : chains_.rows();
    for (int i = threadIdx.x; i < rows * lines; i += kThreads) {
      Prefetch(weights.gamma + chains_.timestep(i / lines) * weights.gamma_stride, i % lines);
    }
  }

  // A value of each of a lane's four output channels of a tile. Defined even if it is not loaded: a
  // predicated load into an undefined register keeps that register for the whole sweep.
  struct Quad {
    InFlight<float> of[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  };

  // gamma of a layer at the timestep of `row`.
  __device__ void LoadGamma(int layer, int tile, int row, Quad* gamma) const {
    if (row >= chains_.rows()) return;
    const ConditionalLayer& weights = a_.call.weights.layers[layer];
    LoadQuad(weights.gamma + chains_.timestep(row) * weights.gamma_stride, tile, gamma);
  }

  __device__ void LoadQuad(const float* from, int tile, Quad* values) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = tile * kTileUnits + LaneUnit(lane_, i);
      if (unit < a_.features) values->of[i] = LoadAhead(from + unit);
    }
  }

  // The conditional layer after its matrix product `sum`.
  __device__ float Activate(int layer, int unit, float gamma, float sum) const {
    const float4 affine = reinterpret_cast<const float4*>(Record(unit))[layer];
    return Softplus(fmaf(gamma * affine.x, fmaf(sum, affine.w, affine.y), affine.z));
  }

  // h1 of the block's tiles. A warp computes one tile at a time, four elements per lane.
  __device__ void Condition() {
    const int classes = a_.classes;
    const int first_tile = Opaque(first_tile_);
    const int items = tiles_ * kRowTiles;
    for (int item = warp_; item < items; item += kWarps) {
      const int tile = first_tile + item / kRowTiles;
      const int j = item % kRowTiles;
      const int row = j * kTileRows + lane_ / 4;
      float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < chains_.rows()) {
        Quad gamma, x;
        LoadGamma(0, tile, row, &gamma);
        LoadQuad(a_.call.features + (a_.first_row + row / a_.window) * a_.call.features_stride,
                 tile, &x);
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const auto add = [&](const float* labels, int first) {
#pragma unroll 1
          for (int c = 0; c < classes; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float* w = Record(tile * kTileUnits + LaneUnit(lane_, i)) + kFirstWeight;
              sum[i] = fmaf(w[first + c], labels[c], sum[i]);
            }
          }
        };
        add(chains_.y(row), 0);
        add(chains_.guidance(row), classes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int unit = tile * kTileUnits + LaneUnit(lane_, i);
          if (unit < a_.features) h[i] = x.of[i] * Activate(0, unit, gamma.of[i], sum[i]);
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
        if (stage == max(a_.stages - kPrefetched, 0)) PrefetchGamma(product + 1);
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        sums.Multiply(weights_.Stage(), RingPlace(stage), tiles, lane_);
        if constexpr (Product::kReadsOthersCopies) __syncwarp();
        weights_.Release();
        CopyActivations(a_.activations[product], stage + kAhead);
      }
      const int first = first_tile_ + pass * a_.pass_tiles;
      const int row = warp_ * kTileRows + lane_ / 4;
      __syncthreads();  // the ring has been read; it now holds the sums of tiles
      for (int i = 0; i < tiles; ++i) {
        Quad gamma;  // arrives during the exchange of sums
        LoadGamma(product + 1, first + i, row, &gamma);
        float* all = reinterpret_cast<float*>(ring_) + i % 2 * kSums;
        sums.Store(i, all + warp_ * (kSums / kWarps), lane_);
        __syncthreads();
        // Meanwhile the next tile's sums are stored to the other half of the ring.
        if (warp_ < kRowTiles) FinishTile(product, first + i, row, gamma, all);
      }
      __syncthreads();  // the sums have been read; the next pass may overwrite the ring
    }
  }

  // Adds the warps' sums of a tile for row tile `warp` and applies the rest of the layer.
  __device__ void FinishTile(int product, int tile, int row, const Quad& gamma, const float* all) {
    float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = LaneUnit(lane_, i);
      const float* from = all + (warp_ * kTileUnits + SumPosition(unit)) * kTileRows + lane_ / 4;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += from[warp * (kSums / kWarps)];
      if (row < chains_.rows() && tile * kTileUnits + unit < a_.features) {
        h[i] = Activate(product + 1, tile * kTileUnits + unit, gamma.of[i], sum);
      }
    }
    if (product == 0) {
      Product::StoreActivations(a_.activations[1], tile, warp_, lane_, h);
    } else {
      AccumulateEps(tile, row, h);
    }
  }

  // ---- the last product ----------------------------------------------------------------------

  // The first block's sums begin with the bias.
  __device__ void ClearEps() {
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads) {
      chains_.eps()[i] = blockIdx.x == 0 ? a_.call.weights.output_bias[i % a_.classes] : 0.0f;
    }
    __syncthreads();
  }

  // Accumulates a tile's contribution to eps. A row belongs to one warp, so there is no concurrent
  // update; its four lanes are reduced by shuffles.
  __device__ void AccumulateEps(int tile, int row, const float (&h)[4]) {
#pragma unroll 1
    for (int c = 0; c < a_.classes; ++c) {
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* record = Record(tile * kTileUnits + LaneUnit(lane_, i));
        part = fmaf(record[kFirstWeight + 2 * a_.classes + c], h[i], part);
      }
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 1);
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 2);
      if (lane_ % 4 == 0 && row < chains_.rows()) chains_.eps()[row * a_.classes + c] += part;
    }
  }

  // Writes the block's partial sums of eps, padded with zeros to a multiple of four.
  __device__ void WriteParts() {
    __syncthreads();
    float* to = reinterpret_cast<float*>(a_.parts + std::int64_t{blockIdx.x} * a_.part_quads);
    for (int i = threadIdx.x; i < 4 * a_.part_quads; i += kThreads) {
      to[i] = i < chains_.rows() * a_.classes ? chains_.eps()[i] : 0.0f;
    }
  }

  // eps of all rows from the partial sums of all blocks. Half a warp adds those of a sixteenth of
  // the blocks, four sums per lane, with kPartsAhead loads in flight: one round for up to 160
  // blocks and 64 sums.
  __device__ void SumParts() {
    constexpr int kPartsAhead = 10;
    const int part_quads = Opaque(a_.part_quads);
    const int blocks = static_cast<int>(gridDim.x);
    const int sixteenth = Opaque(2 * warp_ + lane_ / 16);
    const int first = blocks * sixteenth / 16;
    const int end = blocks * (sixteenth + 1) / 16;
    auto* of_warps = reinterpret_cast<float4*>(ring_);  // [warps, part_quads]
#pragma unroll 1
    for (int begin = 0; begin < part_quads; begin += 16) {
      const int quad = begin + lane_ % 16;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
      for (int block = first; block < end && quad < part_quads; block += kPartsAhead) {
        const float4* from = a_.parts + std::int64_t{block} * part_quads + quad;
        InFlight<float4> parts[kPartsAhead];
#pragma unroll
        for (int k = 0; k < kPartsAhead; ++k, from += part_quads) {
          parts[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (block + k < end) parts[k] = LoadAheadL2(from);
        }
#pragma unroll
        for (int k = 0; k < kPartsAhead; ++k) {
          const float4 part = parts[k];
          sum.x += part.x;
          sum.y += part.y;
          sum.z += part.z;
          sum.w += part.w;
        }
      }
      sum.x += __shfl_xor_sync(0xFFFFFFFFu, sum.x, 16);
      sum.y += __shfl_xor_sync(0xFFFFFFFFu, sum.y, 16);
      sum.z += __shfl_xor_sync(0xFFFFFFFFu, sum.z, 16);
      sum.w += __shfl_xor_sync(0xFFFFFFFFu, sum.w, 16);
      if (lane_ < 16 && quad < part_quads) of_warps[warp_ * part_quads + quad] = sum;
    }
    __syncthreads();
    const auto* sums = reinterpret_cast<const float*>(of_warps);
    for (int i = threadIdx.x; i < chains_.rows() * a_.classes; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * 4 * part_quads + i];
      chains_.eps()[i] = sum;
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
