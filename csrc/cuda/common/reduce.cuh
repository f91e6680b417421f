// Values of all threads of a warp or a block made into one, in the same order always.
#ifndef DIFFMIC_CUDA_COMMON_REDUCE_CUH_
#define DIFFMIC_CUDA_COMMON_REDUCE_CUH_

#include <cuda_runtime.h>

namespace diffmic::cuda {

template <typename T, typename Combine>
__device__ __forceinline__ T WarpReduce(T value, Combine combine) {
  for (int apart = 16; apart > 0; apart /= 2) {
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, apart));
  }
  return value;
}

// For all threads of a block of 32 kWarps; each of them gets the value.
template <int kWarps, typename T, typename Combine>
__device__ __forceinline__ T BlockReduce(T value, Combine combine) {
  __shared__ T of_warps[kWarps];
  value = WarpReduce(value, combine);
  __syncthreads();  // those of the time before have been read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_REDUCE_CUH_
