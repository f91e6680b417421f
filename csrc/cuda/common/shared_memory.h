// Dynamic shared memory beyond the 48 KB that every kernel may use, which a kernel has to opt in
// to.
#ifndef DIFFMIC_CUDA_COMMON_SHARED_MEMORY_H_
#define DIFFMIC_CUDA_COMMON_SHARED_MEMORY_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/common/error.h"

namespace diffmic::cuda {

// Launches with less need no opt-in: 48 KB less 16 KB for a kernel's static arrays.
inline constexpr std::size_t kSharedWithoutOptIn = 32 * 1024;

// Lets launches of `kernel` on the current device use all of its shared memory. The limit is an
// attribute of the kernel and not of a launch: it is set to the largest value, once per device and
// kernel, so that threads that launch with different sizes do not lower each other's.
inline void AllowSharedMemory(const char* operation, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  Check(cudaGetDevice(&device), operation, "cudaGetDevice");
  const std::lock_guard lock(mutex);  // held until the limit is set: others may launch after it
  if (allowed.contains({device, kernel})) return;
  int most = 0;
  Check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), operation,
        "cudaDeviceGetAttribute");
  cudaFuncAttributes attributes{};
  Check(cudaFuncGetAttributes(&attributes, kernel), operation, "cudaFuncGetAttributes");
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        operation, "cudaFuncSetAttribute");
  allowed.emplace(device, kernel);
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_SHARED_MEMORY_H_
