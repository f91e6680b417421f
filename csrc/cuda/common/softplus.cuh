// softplus(n) = ln(1 + exp(n)) and its derivative, from exp(-|n|), which cannot overflow.
#ifndef DIFFMIC_CUDA_COMMON_SOFTPLUS_CUH_
#define DIFFMIC_CUDA_COMMON_SOFTPLUS_CUH_

#include <cuda_runtime.h>

namespace diffmic::cuda {

__device__ __forceinline__ float Decay(float n) { return expf(-fabsf(n)); }
// Above 20, where PyTorch returns n, the second term is smaller than the rounding error of n.
__device__ __forceinline__ float Softplus(float n, float decay) {
  return fmaxf(n, 0.0f) + log1pf(decay);
}
__device__ __forceinline__ float Softplus(float n) { return Softplus(n, Decay(n)); }
// The derivative, 1 / (1 + exp(-n)). NaN propagates through `decay`.
__device__ __forceinline__ float Sigmoid(float n, float decay) {
  return (n > 0.0f ? 1.0f : decay) / (1.0f + decay);
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_SOFTPLUS_CUH_
