// A barrier of all blocks of a cooperative launch, in two halves: what does not depend on the
// others is done between them.
#ifndef DIFFMIC_CUDA_COMMON_GRID_BARRIER_CUH_
#define DIFFMIC_CUDA_COMMON_GRID_BARRIER_CUH_

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace diffmic::cuda {

// `counter` is zero when the launch begins and is used by nothing else. All threads of all blocks
// call the same halves in the same order.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(std::uint32_t* counter) : counter_(counter) {}

  // Everything that the block has written is there for whoever passes the Wait.
  __device__ void Arrive() {
    __syncthreads();
    if (threadIdx.x == 0) AddRelease(counter_, 1);
    // It may wrap around: only differences are looked at.
    target_ += gridDim.x;
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
