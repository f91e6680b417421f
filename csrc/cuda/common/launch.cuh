// Kernel launches: Launch("mmd", kernel, {grid, block, shared, stream}, arguments...). Kernels are
// never launched by <<<>>>, so that the emulator of tests/emulator/ can replace this header.
#ifndef DIFFMIC_CUDA_COMMON_LAUNCH_CUH_
#define DIFFMIC_CUDA_COMMON_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda/common/error.h"
#include "cuda/common/shared_memory.h"

// The dynamic shared memory of a block, one declaration for all kernels.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

namespace diffmic::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks are resident at once, as a grid barrier requires
};

// Launches `kernel` asynchronously; does nothing if the grid is empty. Throws Error, which names
// `operation`, if the launch fails.
template <typename... Parameters, typename... Arguments>
void Launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared > kSharedWithoutOptIn) AllowSharedMemory(operation, function);
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
