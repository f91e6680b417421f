// Errors of the CUDA runtime as exceptions, and the guard that makes a device current.
#ifndef DIFFMIC_CUDA_COMMON_ERROR_H_
#define DIFFMIC_CUDA_COMMON_ERROR_H_

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "include/text.h"

namespace diffmic::cuda {

// A failed CUDA call. The message names the operation, the call, the error and what it means.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// `operation` is the public name, "mmd"; `call` the function of the runtime that said `status`.
inline void Check(cudaError_t status, const char* operation, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // must not be found by the next launch
  const char* advice = "";
  if (status == cudaErrorNoKernelImageForDevice) {
    advice =
        ": this build holds no code for this GPU (python -m diffmic_fast info); rebuild with "
        "TORCH_CUDA_ARCH_LIST set to its compute capability";
  }
  throw Error(Text(operation, ": ", call, " failed: ", cudaGetErrorName(status), ": ",
                   cudaGetErrorString(status), advice));
}

// The device is current while the guard lives, and the one of before is again after it.
class DeviceGuard {
 public:
  DeviceGuard(const char* operation, int device) {
    Check(cudaGetDevice(&before_), operation, "cudaGetDevice");
    if (before_ == device) return;
    Check(cudaSetDevice(device), operation, "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_ERROR_H_
