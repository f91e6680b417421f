// CUDA runtime errors as exceptions, and a guard for the current device.
#ifndef DIFFMIC_CUDA_COMMON_ERROR_H_
#define DIFFMIC_CUDA_COMMON_ERROR_H_

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "include/text.h"

namespace diffmic::cuda {

// A failed CUDA call. The message names the operation, the call and the error.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Error unless `status` is cudaSuccess. `operation` is the public name, such as "mmd";
// `call` is the runtime function that returned `status`.
inline void Check(cudaError_t status, const char* operation, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next launch would report again
  const char* advice = "";
  if (status == cudaErrorNoKernelImageForDevice) {
    advice =
        ": this build holds no code for this GPU (python -m diffmic_fast info); rebuild with "
        "TORCH_CUDA_ARCH_LIST set to its compute capability";
  }
  throw Error(Text(operation, ": ", call, " failed: ", cudaGetErrorName(status), ": ",
                   cudaGetErrorString(status), advice));
}

// Makes `device` current for the guard's lifetime, then restores the previous device.
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
