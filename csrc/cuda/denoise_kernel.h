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
// Windows: rows may be several steps of one chain (csrc/cpu/denoise_window.cpp tells the method).
// The walk through a window is repeated by every block from the same numbers, so all of them slide
// it alike without a word.
//
// Sums are in one order: a warp's eighth of the depth, the eighths, the tiles of a block, the
// blocks. A row's bits depend on the number of blocks, which is the device's, not on other rows.
#ifndef DIFFMIC_CUDA_DENOISE_KERNEL_H_
#define DIFFMIC_CUDA_DENOISE_KERNEL_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/denoise_layout.h"
#include "cuda/grid_barrier.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "philox.h"

namespace diffmic::cuda::denoise {

struct KernelArguments {
  int features, classes, unit_tiles, stages, pass_tiles, slots, resident;
  const uint4* packed;
  const float4* affine;  // [3][16 unit_tiles]: gain, bias, offset (denoise_pack.cu)
  Weights weights;

  Steps steps;
  Chain chain;  // of all rows; the launch serves those from first_row on
  std::int64_t first_row;
  int chains, window;
  float tolerance;
  bool fresh;  // the chains begin with this launch
  int sweeps;

  // Kept from launch to launch: where each chain stands, and its window's states.
  int* begin;     // [chains]
  float* states;  // [chains * window, C]

  unsigned char* activations[2];  // h1 and h2
  float* parts;                   // [chains * window * C, blocks]
  std::uint32_t* counter;         // zero
};

// The numbers of a launch's rows that each block keeps for itself, in shared memory. Row r is step
// r % window of the window of chain r / window.
struct BlockState {
  float* y;         // [rows, C], what eps is evaluated at
  float* eps;       // [rows, C]
  float* walked;    // [chains, window + 1, C]
  float* noise;     // [chains, 2 window, C]: of step i in place i % (2 window)
  float* prior;     // [chains, C]
  float* guidance;  // [chains, C]
  int* begin;       // [chains]: the first step that is not settled
  int* advance;     // [chains]: steps settled by the last evaluation
  int* timestep;    // [rows]
};

__host__ __device__ inline std::size_t BlockStateBytes(int chains, int window, int classes) {
  const std::size_t rows = static_cast<std::size_t>(chains) * window;
  const std::size_t vectors = 4 * rows + 3 * static_cast<std::size_t>(chains) + rows;
  return (vectors * classes + 2 * static_cast<std::size_t>(chains) + rows) * 4;
}

__device__ inline BlockState CarveState(void* memory, int chains, int window, int classes) {
  const int rows = chains * window;
  BlockState state;
  state.y = static_cast<float*>(memory);
  state.eps = state.y + rows * classes;
  state.walked = state.eps + rows * classes;
  state.noise = state.walked + (rows + chains) * classes;
  state.prior = state.noise + 2 * rows * classes;
  state.guidance = state.prior + chains * classes;
  state.begin = reinterpret_cast<int*>(state.guidance + chains * classes);
  state.advance = state.begin + chains;
  state.timestep = state.advance + chains;
  return state;
}

// The copies of a warp's weights into its slots, a stage at a time in the order of use, step after
// step. Stages [0, resident) of a step keep their slots; the others take turns with the rest.
class WeightStream {
 public:
  __device__ WeightStream(const KernelArguments& a, uint4* slots, int first_tile, int tiles,
                          int warp, int lane)
      : a_(a),
        slots_(slots + lane),
        first_tile_(first_tile),
        tiles_(tiles),
        warp_(warp),
        lane_(lane) {
    passes_ = (tiles + a.pass_tiles - 1) / a.pass_tiles;
    step_stages_ = 2 * passes_ * a.stages;
    left_ = (step_stages_ - min(a.resident, step_stages_)) * a.sweeps;
  }

  __device__ int passes() const { return passes_; }
  __device__ int PassTiles(int pass) const {
    return min(a_.pass_tiles, tiles_ - pass * a_.pass_tiles);
  }

  // Fills all slots.
  __device__ void Begin() {
    for (int stage = 0; stage < min(a_.resident, step_stages_); ++stage) Copy(stage);
    for (int slot = a_.resident; slot < a_.slots; ++slot) CopyNext();
    CommitCopies();
  }

  // The slot of the stage whose turn it is.
  __device__ const uint4* Stage() const {
    return Slot(use_ < a_.resident ? use_ : a_.resident + use_slot_);
  }

  // Done with that stage: its slot is for the next copy, unless it is to stay.
  __device__ void Release() {
    if (use_ >= a_.resident) {
      CopyNext();
      if (++use_slot_ == a_.slots - a_.resident) use_slot_ = 0;
    }
    if (++use_ == step_stages_) use_ = 0;
  }

 private:
  __device__ uint4* Slot(int slot) const {
    return slots_ + static_cast<std::int64_t>(slot) * a_.pass_tiles * kStagePieces * kPiece;
  }

  // A stage that is not resident, after the one before.
  __device__ void CopyNext() {
    if (left_ == 0) return;
    --left_;
    CopyTo(a_.resident + copy_slot_, a_.resident + copy_);
    if (++copy_slot_ == a_.slots - a_.resident) copy_slot_ = 0;
    if (++copy_ == step_stages_ - a_.resident) copy_ = 0;
  }

  __device__ void Copy(int stage) { CopyTo(stage, stage); }

  __device__ void CopyTo(int slot, int stage) {
    const int product = stage / (passes_ * a_.stages);
    const int rest = stage - product * passes_ * a_.stages;
    const int pass = rest / a_.stages;
    uint4* to = Slot(slot);
    for (int i = 0; i < PassTiles(pass); ++i) {
      const int tile = first_tile_ + pass * a_.pass_tiles + i;
      const uint4* from =
          a_.packed +
          (PieceIndex(a_.unit_tiles, a_.stages, product, tile, warp_, rest - pass * a_.stages) *
           kPiece) +
          lane_;
#pragma unroll
      for (int piece = 0; piece < kStagePieces; ++piece) {
        CopyAsync16(to + (i * kStagePieces + piece) * kPiece, from + piece * kPiece);
      }
    }
  }

  const KernelArguments& a_;
  uint4* slots_;
  int first_tile_, tiles_, warp_, lane_;
  int passes_, step_stages_, left_;
  int use_ = 0, use_slot_ = 0, copy_ = 0, copy_slot_ = 0;
};

__device__ __forceinline__ float Softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Everything a block does; the kernel is its Main.
template <class Product>
class Block {
 public:
  static constexpr int kRowTiles = Product::kRows;
  // Stages of activations under way: deeper needs more memory and hides more of L2's latency.
  static constexpr int kAhead = kRowTiles < 8 ? 4 : 2;
  static constexpr int kActivationRing = kAhead * kWarps * kRowTiles * kActivationBytes;
  static constexpr int kSums = kWarps * kRowTiles * kTileUnits * kTileRows;  // of a tile
  static_assert(2 * kSums * 4 <= kActivationRing);

  __device__ explicit Block(const KernelArguments& a)
      : a_(a),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        rows_(a.chains * a.window),
        first_tile_(TileOf(blockIdx.x)),
        tiles_(TileOf(blockIdx.x + 1) - first_tile_),
        barrier_(a.counter),
        ring_(dynamic_shared),
        slots_(reinterpret_cast<uint4*>(dynamic_shared + kActivationRing) +
               std::int64_t{warp_} * a.slots * a.pass_tiles * kStagePieces * kPiece),
        state_(CarveState(
            dynamic_shared + kActivationRing +
                std::int64_t{kWarps} * a.slots * a.pass_tiles * kStagePieces * kPiece * 16,
            a.chains, a.window, a.classes)),
        stream_(a, slots_, first_tile_, tiles_, warp_, lane_) {}

  __device__ void Main() {
    stream_.Begin();
    Load();
    for (int sweep = 0; sweep < a_.sweeps; ++sweep) {
      if (Finished()) break;
      PlaceRows();
      Condition();
      barrier_.Sync();
      Multiply(0);
      barrier_.Sync();
      ClearEps();
      Multiply(1);
      TellEps();
      barrier_.Arrive();
      DrawNoise();
      barrier_.Wait();
      AddEps();
      Walk();
    }
    Save();
    WaitCopies<0>();
  }

 private:
  __device__ int TileOf(unsigned block) const {
    return static_cast<int>(std::int64_t{a_.unit_tiles} * block / gridDim.x);
  }
  __device__ int Count() const { return static_cast<int>(a_.steps.count); }
  __device__ int Windows() const { return 2 * a_.window; }

  // ---- state ---------------------------------------------------------------------------------

  __device__ void Load() {
    const int classes = a_.classes;
    for (int i = threadIdx.x; i < a_.chains * classes; i += kThreads) {
      const std::int64_t from = a_.first_row * classes + i;
      state_.prior[i] = a_.chain.prior[from];
      state_.guidance[i] = a_.chain.guidance[from];
    }
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.begin[chain] = a_.fresh ? 0 : a_.begin[chain];
      state_.advance[chain] = Windows();  // no noise is there yet
    }
    if (!a_.fresh) {
      for (int i = threadIdx.x; i < rows_ * classes; i += kThreads) state_.y[i] = a_.states[i];
    }
    __syncthreads();
    if (a_.fresh) BeginChains();
    DrawNoise();
    __syncthreads();
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) state_.advance[chain] = 0;
    __syncthreads();
  }

  // Every state of the first window is guessed to be the chain's beginning.
  __device__ void BeginChains() {
    const int quads = (a_.classes + 3) / 4;
    for (int i = threadIdx.x; i < a_.chains * quads; i += kThreads) {
      const int chain = i / quads;
      const int quad = i % quads;
      const philox::Normals noise = Draw(chain, 0, quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = 4 * quad + k;
        if (c >= a_.classes) continue;
        const float y = __fadd_rn(state_.prior[chain * a_.classes + c], noise.z[k]);
        for (int step = 0; step < a_.window; ++step) GuessOf(chain, step)[c] = y;
        Tell(chain, 0, c, y);
      }
    }
  }

  // A settled state: `moment` steps are done.
  __device__ void Tell(int chain, int moment, int c, float y) const {
    if (blockIdx.x != 0) return;
    const std::int64_t row = a_.first_row + chain;
    if (a_.chain.trajectory != nullptr) {
      a_.chain.trajectory[(moment * a_.chain.rows + row) * a_.classes + c] = y;
    }
    if (moment == Count()) a_.chain.out[row * a_.classes + c] = y;
  }

  __device__ bool Finished() const {
    for (int chain = 0; chain < a_.chains; ++chain) {
      if (state_.begin[chain] < Count()) return false;
    }
    return true;
  }

  // The timestep of every row. Rows beyond a chain's end repeat its last step, for nobody.
  __device__ void PlaceRows() {
    for (int row = threadIdx.x; row < rows_; row += kThreads) {
      const int step = min(state_.begin[row / a_.window] + row % a_.window, Count() - 1);
      state_.timestep[row] = static_cast<int>(a_.steps.timesteps[step]);
    }
    __syncthreads();
  }

  __device__ void Save() {
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i < rows_ * a_.classes; i += kThreads) a_.states[i] = state_.y[i];
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      a_.begin[chain] = state_.begin[chain];
    }
  }

  // ---- noise ---------------------------------------------------------------------------------

  // Four classes of the noise of a moment: 0 makes the beginning, i is z of step i - 1.
  __device__ philox::Normals Draw(int chain, int moment, int quad) const {
    const std::int64_t row = a_.first_row + chain;
    if (a_.chain.noise != nullptr) {
      const float* from = a_.chain.noise + (moment * a_.chain.rows + row) * a_.classes;
      philox::Normals given;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        given.z[k] = 4 * quad + k < a_.classes ? from[4 * quad + k] : 0.0f;
      }
      return given;
    }
    const auto timestep =
        static_cast<std::uint32_t>(moment == 0 ? a_.steps.start : a_.steps.timesteps[moment - 1]);
    return philox::Normal(a_.chain.seed, static_cast<std::uint64_t>(a_.chain.images[row]),
                          static_cast<std::uint32_t>(a_.chain.samples[row]), timestep,
                          static_cast<std::uint32_t>(quad));
  }

  // The noise of the steps that came into reach with the last advance: up to two windows ahead.
  __device__ void DrawNoise() {
    const int quads = (a_.classes + 3) / 4;
    for (int i = threadIdx.x; i < a_.chains * Windows() * quads; i += kThreads) {
      const int chain = i / (Windows() * quads);
      const int ahead = i / quads % Windows();
      const int step = state_.begin[chain] + ahead;
      if (ahead < Windows() - state_.advance[chain] || step >= Count()) continue;
      if (!(Coefficient(6, step) > 0.0f)) continue;  // a step without noise draws none
      const int quad = i % quads;
      const philox::Normals noise = Draw(chain, step + 1, quad);
      float* to = NoiseOf(chain, step) + 4 * quad;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (4 * quad + k < a_.classes) to[k] = noise.z[k];
      }
    }
  }

  __device__ float* NoiseOf(int chain, int step) const {
    return state_.noise + (chain * Windows() + step % Windows()) * a_.classes;
  }

  __device__ float Coefficient(int column, int step) const {
    return a_.steps.table[column * a_.steps.count + step];
  }

  // ---- layers --------------------------------------------------------------------------------

  // softplus of the conditional layer around `sum`; gain, bias and offset hold BatchNorm.
  __device__ float Activate(int layer, int unit, int row, float sum) const {
    const Layer& weights = a_.weights.layers[layer];
    const float4 affine = a_.affine[layer * a_.unit_tiles * kTileUnits + unit];
    const float gamma = weights.gamma[state_.timestep[row] * weights.gamma_stride + unit];
    return Softplus(fmaf(gamma * affine.x, sum + affine.y, affine.z));
  }

  // h1 of the block's tiles. A warp makes 16 units of 8 rows at a time, four a lane.
  __device__ void Condition() {
    const int classes = a_.classes;
    for (int item = warp_; item < tiles_ * kRowTiles; item += kWarps) {
      const int tile = first_tile_ + item / kRowTiles;
      const int j = item % kRowTiles;
      const int row = j * kTileRows + lane_ / 4;
      float h[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < rows_) {
        const int chain = row / a_.window;
        const float* x = a_.chain.features + (a_.first_row + chain) * a_.chain.features_stride;
        const float* y = state_.y + row * classes;
        const float* guidance = state_.guidance + chain * classes;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int unit = tile * kTileUnits + LaneUnit(lane_, i);
          if (unit >= a_.features) continue;
          const Layer& layer = a_.weights.layers[0];
          const float* w = layer.weight + unit * layer.weight_stride;
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
      if (row < rows_ && tile * kTileUnits + unit < a_.features) {
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
    for (int i = threadIdx.x; i < rows_ * a_.classes; i += kThreads) state_.eps[i] = 0.0f;
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
          part = fmaf(a_.weights.output_weight[c * a_.weights.output_stride + unit], h[i], part);
        }
      }
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 1);
      part += __shfl_xor_sync(0xFFFFFFFFu, part, 2);
      if (lane_ % 4 == 0 && row < rows_) state_.eps[row * a_.classes + c] += part;
    }
  }

  __device__ void TellEps() {
    __syncthreads();
    for (int i = threadIdx.x; i < rows_ * a_.classes; i += kThreads) {
      a_.parts[std::int64_t{i} * gridDim.x + blockIdx.x] = state_.eps[i];
    }
  }

  // eps of all rows, from all blocks, by each.
  __device__ void AddEps() {
    for (int i = warp_; i < rows_ * a_.classes; i += kWarps) {
      const float* parts = a_.parts + std::int64_t{i} * gridDim.x;
      float sum = 0.0f;
      for (unsigned block = lane_; block < gridDim.x; block += 32) {
        sum += LoadSharedFloat(parts + block);
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
      if (lane_ == 0) state_.eps[i] = sum + a_.weights.output_bias[i % a_.classes];
    }
    __syncthreads();
  }

  // ---- steps ---------------------------------------------------------------------------------

  // One step of one class, each operation rounded on its own, in the definition's order.
  __device__ float Move(int chain, int step, int c, float eps, float y) const {
    const float s = Coefficient(0, step);
    const float prior = state_.prior[chain * a_.classes + c];
    const float rest = __fsub_rn(y, __fmul_rn(__fsub_rn(1.0f, s), prior));
    const float y0 =
        __fmul_rn(__fdiv_rn(1.0f, s), __fsub_rn(rest, __fmul_rn(eps, Coefficient(1, step))));
    const float mean = __fadd_rn(
        __fadd_rn(__fmul_rn(Coefficient(2, step), y0), __fmul_rn(Coefficient(3, step), y)),
        __fmul_rn(Coefficient(4, step), prior));
    const float moved = __fadd_rn(mean, __fmul_rn(Coefficient(5, step), eps));
    const float sigma = Coefficient(6, step);
    if (!(sigma > 0.0f)) return moved;
    return __fadd_rn(moved, __fmul_rn(sigma, NoiseOf(chain, step)[c]));
  }

  __device__ bool Same(float a, float b) const {
    if (__float_as_uint(a) == __float_as_uint(b)) return true;
    return a_.tolerance > 0.0f && fabsf(a - b) <= a_.tolerance;
  }

  // From the first state of each window, which is the chain's own, through the window with the eps
  // that were evaluated at its guesses. As far as the states come to are those guesses, they are
  // the chain's own too. A thread walks one class of a chain.
  __device__ void Walk() {
    const int classes = a_.classes;
    const int all = a_.chains * classes;
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.advance[chain] = Length(chain);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const int chain = i / classes;
      const int c = i % classes;
      const int length = Length(chain);
      int own = length;
      float y = length > 0 ? GuessOf(chain, 0)[c] : 0.0f;
      for (int k = 0; k < length; ++k) {
        if (k > 0 && own == length && !Same(y, GuessOf(chain, k)[c])) own = k;
        y = Move(chain, state_.begin[chain] + k, c, EpsOf(chain, k)[c], y);
        WalkedOf(chain, k + 1)[c] = y;
      }
      if (own < length) atomicMin(&state_.advance[chain], own);  // all classes have to agree
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) Slide(i / classes, i % classes);
    __syncthreads();
    for (int chain = threadIdx.x; chain < a_.chains; chain += kThreads) {
      state_.begin[chain] += state_.advance[chain];
    }
    __syncthreads();
  }

  // Moves a chain's window past what is settled. States beyond those come to are guessed as if eps
  // stayed what it was at the last of them.
  __device__ void Slide(int chain, int c) {
    const int begin = state_.begin[chain];
    const int length = Length(chain);
    const int advance = state_.advance[chain];
    for (int k = 1; k <= advance; ++k) Tell(chain, begin + k, c, WalkedOf(chain, k)[c]);
    float y = 0.0f;
    for (int k = 0; k < a_.window && begin + advance + k < Count(); ++k) {
      y = advance + k <= length
              ? WalkedOf(chain, advance + k)[c]
              : Move(chain, begin + advance + k - 1, c, EpsOf(chain, length - 1)[c], y);
      GuessOf(chain, k)[c] = y;
    }
  }

  // Steps that are in the window.
  __device__ int Length(int chain) const { return min(a_.window, Count() - state_.begin[chain]); }
  __device__ float* GuessOf(int chain, int k) const {
    return state_.y + (chain * a_.window + k) * a_.classes;
  }
  __device__ float* EpsOf(int chain, int k) const {
    return state_.eps + (chain * a_.window + k) * a_.classes;
  }
  __device__ float* WalkedOf(int chain, int k) const {
    return state_.walked + (chain * (a_.window + 1) + k) * a_.classes;
  }

  const KernelArguments& a_;
  int warp_, lane_, rows_, first_tile_, tiles_;
  GridBarrier barrier_;
  unsigned char* ring_;
  uint4* slots_;
  BlockState state_;
  WeightStream stream_;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_KERNEL_H_
