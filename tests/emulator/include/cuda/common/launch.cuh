// Replaces csrc/cuda/common/launch.cuh: a launch runs the kernel synchronously in the emulator.
#ifndef DIFFMIC_EMULATOR_CUDA_LAUNCH_H_
#define DIFFMIC_EMULATOR_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <tuple>
#include <utility>

#include "cuda/common/error.h"
#include "cuda/common/shared_memory.h"

extern thread_local unsigned char dynamic_shared[];

namespace diffmic::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;
};

template <typename... Parameters, typename... Arguments>
void Launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape,
            Arguments&&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  if (shape.shared > kSharedWithoutOptIn) {
    AllowSharedMemory(operation, reinterpret_cast<const void*>(kernel));
  }
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulator::Run(reinterpret_cast<const void*>(kernel), {shape.grid.x, shape.grid.y, shape.grid.z},
                {shape.block.x, shape.block.y, shape.block.z}, shape.shared, shape.cooperative,
                [&] { std::apply(kernel, values); });
}

}  // namespace diffmic::cuda

#endif  // DIFFMIC_EMULATOR_CUDA_LAUNCH_H_
