// A split barrier (arrive, wait) over all blocks of a cooperative launch. Work that does not depend
// on other blocks is done between its halves.
#ifndef DIFFMIC_CUDA_COMMON_GRID_BARRIER_CUH_
#define DIFFMIC_CUDA_COMMON_GRID_BARRIER_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace diffmic::cuda {

// `counter` is zero at launch and has no other use. All threads of all blocks must call the same
// halves in the same order. Not cooperative_groups::grid_group: its barrier is inline PTX of
// NVIDIA's headers, which the emulator of tests/emulator/ can neither run nor check for races.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(std::uint32_t* counter) : counter_(counter) {}

  // Release: what the block wrote before is visible to every thread after its Wait.
  __device__ void Arrive() {
    __syncthreads();
    if (threadIdx.x == 0) AddRelease(counter_, 1);
    target_ += gridDim.x;  // may wrap around: Wait compares the difference
  }

  __device__ void Wait() {
    if (threadIdx.x == 0) {
      while (static_cast<std::int32_t>(LoadAcquire(counter_) - target_) < 0) SpinPause();
    }
    __syncthreads();
  }

  __device__ void Sync() {
    Arrive();
    Wait();
  }

 private:
  std::uint32_t* counter_;
  std::uint32_t target_ = 0;
};

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_GRID_BARRIER_CUH_
