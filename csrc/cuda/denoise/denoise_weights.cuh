// The weight pipeline of a warp: asynchronous copies from global memory into the warp's slots of
// shared memory, one stage at a time in the order of use. Weights depend on no result, so the
// copies run ahead of barriers and steps. Stages [0, resident) of a step stay in their slots; the
// others share the remaining slots as a ring. A lane reads only the bytes that it has copied, so
// waiting for its own copies is the only synchronisation.
#ifndef DIFFMIC_CUDA_DENOISE_DENOISE_WEIGHTS_CUH_
#define DIFFMIC_CUDA_DENOISE_DENOISE_WEIGHTS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/denoise/denoise_arguments.h"
#include "cuda/denoise/denoise_layout.cuh"

namespace diffmic::cuda::denoise {

// kPieces: StagePieces of the weights.
template <int kPieces>
class WeightPipeline {
 public:
  __device__ WeightPipeline(const KernelArguments& a, uint4* slots, int first_tile, int tiles,
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
    for (int stage = 0; stage < min(a_.resident, step_stages_); ++stage) {
      CopyTo(stage, stage);
    }
    for (int slot = a_.resident; slot < a_.slots; ++slot) CopyNext();
    CommitCopies();
  }

  // The current stage.
  __device__ const uint4* Stage() const {
    return Slot(use_ < a_.resident ? use_ : a_.resident + use_slot_);
  }

  // Advances to the next stage. The slot of the current one is refilled unless it is resident.
  __device__ void Release() {
    if (use_ >= a_.resident) {
      CopyNext();
      if (++use_slot_ == a_.slots - a_.resident) use_slot_ = 0;
    }
    if (++use_ == step_stages_) use_ = 0;
  }

 private:
  __device__ uint4* Slot(int slot) const {
    return slots_ + static_cast<std::int64_t>(slot) * a_.pass_tiles * kPieces * kPiece;
  }

  // Starts the copy of the next stage that is not resident.
  __device__ void CopyNext() {
    if (left_ == 0) return;
    --left_;
    CopyTo(a_.resident + copy_slot_, a_.resident + copy_);
    if (++copy_slot_ == a_.slots - a_.resident) copy_slot_ = 0;
    if (++copy_ == step_stages_ - a_.resident) copy_ = 0;
  }

  __device__ void CopyTo(int slot, int stage) {
    const int product = stage / (passes_ * a_.stages);
    const int rest = stage - product * passes_ * a_.stages;
    const int pass = rest / a_.stages;
    uint4* to = Slot(slot);
    for (int i = 0; i < PassTiles(pass); ++i) {
      const int tile = first_tile_ + pass * a_.pass_tiles + i;
      const uint4* from =
          a_.packed +
          StageIndex(a_.unit_tiles, a_.stages, product, tile, warp_, rest - pass * a_.stages) *
              kPieces * kPiece +
          lane_;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        CopyAsync16(to + (i * kPieces + piece) * kPiece, from + piece * kPiece);
      }
    }
  }

  const KernelArguments& a_;
  uint4* slots_;
  int first_tile_, tiles_, warp_, lane_;
  int passes_, step_stages_, left_;
  int use_ = 0, use_slot_ = 0, copy_ = 0, copy_slot_ = 0;
};

}  // namespace diffmic::cuda::denoise

#endif  // DIFFMIC_CUDA_DENOISE_DENOISE_WEIGHTS_CUH_
