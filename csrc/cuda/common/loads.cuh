// Loads from global memory that are issued together before one of their values is used, so that
// their latencies overlap. The compiler needs no help for it: these functions state the intention,
// and the emulator of tests/emulator/, which replaces this header, counts the rounds that remain.
#ifndef DIFFMIC_CUDA_COMMON_LOADS_CUH_
#define DIFFMIC_CUDA_COMMON_LOADS_CUH_

#include <cuda_runtime.h>

namespace diffmic::cuda {

// A value that may still be on its way. Its first use waits for it.
template <typename T>
using InFlight = T;

template <typename T>
__device__ __forceinline__ InFlight<T> LoadAhead(const T* address) {
  return *address;
}

// From the L2 cache, past the L1 cache: for values that other blocks wrote during the launch.
template <typename T>
__device__ __forceinline__ InFlight<T> LoadAheadL2(const T* address) {
  return __ldcg(address);
}

// Brings the line of 128 bytes at a valid address into the L2 cache.
__device__ __forceinline__ void PrefetchL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_LOADS_CUH_
