// Reductions over a warp and a thread block, in a fixed order; every thread receives the result.
// Not CUB: the order in which it combines values may change between versions, and the emulator of
// tests/emulator/ cannot compile its inline PTX.
#ifndef DIFFMIC_CUDA_COMMON_REDUCE_CUH_
#define DIFFMIC_CUDA_COMMON_REDUCE_CUH_

#include <cuda_runtime.h>

namespace diffmic::cuda {

template <typename T, typename Combine>
__device__ __forceinline__ T WarpReduce(T value, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  return value;
}

// Called by all threads of a block of 32 * kWarps.
template <int kWarps, typename T, typename Combine>
__device__ __forceinline__ T BlockReduce(T value, Combine combine) {
  __shared__ T of_warps[kWarps];
  value = WarpReduce(value, combine);
  __syncthreads();  // an earlier call's values have been read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_REDUCE_CUH_
