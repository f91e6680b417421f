// How a kernel is started: Launch("mmd", kernel, {grid, block, shared, stream}, arguments...),
// never
// <<<>>>. The emulator of tests/emulator/ stands in for this file with its own.
#ifndef DIFFMIC_CUDA_COMMON_LAUNCH_CUH_
#define DIFFMIC_CUDA_COMMON_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda/common/error.h"

// All dynamic shared memory of a block, of whatever kernel.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

namespace diffmic::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  bool cooperative =
      false;  // all blocks are resident at once, so that they may wait for each other
};

// Starts `kernel` and returns; an empty grid is no launch. Throws Error, naming `operation`, where
// the start fails.
template <typename... Parameters, typename... Arguments>
void Launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared > 48 * 1024) {  // more has to be asked for
    Check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared)),
          operation, "cudaFuncSetAttribute");
  }
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](Parameters&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
        if (shape.cooperative) {
          Check(cudaLaunchCooperativeKernel(function, shape.grid, shape.block, pointers,
                                            shape.shared, shape.stream),
                operation, "cudaLaunchCooperativeKernel");
        } else {
          Check(cudaLaunchKernel(function, shape.grid, shape.block, pointers, shape.shared,
                                 shape.stream),
                operation, "cudaLaunchKernel");
        }
      },
      values);
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_LAUNCH_CUH_
