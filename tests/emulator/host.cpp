// The functions of the CUDA runtime that launchers call. Launches are synchronous, so streams have
// no effect.
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#include "buffers.h"
#include "cuda_runtime.h"
#include "emulator.h"

namespace diffmic::emulator {
namespace {
std::mutex limits_mutex;
std::vector<SharedLimit> limits;
}  // namespace

std::vector<SharedLimit> SharedLimits() {
  const std::lock_guard lock(limits_mutex);
  return limits;
}

}  // namespace diffmic::emulator

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const auto& config = diffmic::emulator::config;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = config.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = config.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = config.shared_per_multiprocessor;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = config.threads_per_multiprocessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*kernel*/) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute /*attribute*/, int value) {
  // As slow as a driver may be, so that threads that do not wait for each other are seen.
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const std::lock_guard lock(diffmic::emulator::limits_mutex);
  diffmic::emulator::limits.push_back({kernel, value});
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  diffmic::emulator::MarkWritten(memory, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  diffmic::emulator::MarkWritten(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
