// Copies of a few kilobytes from the host to a GPU that travel in the parameters of kernels. The
// host never waits for the device, as it may for a cudaMemcpyAsync from pageable memory, and may
// change or free the source as soon as the call returns. A CUDA graph that captures the call holds
// the values themselves.
#ifndef DIFFMIC_CUDA_COMMON_UPLOAD_H_
#define DIFFMIC_CUDA_COMMON_UPLOAD_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffmic::cuda {

// Enqueues the copy of `bytes` bytes from host memory to `to`, which is aligned to 4 bytes.
void Upload(const void* from, std::int64_t bytes, void* to, cudaStream_t stream);

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_UPLOAD_H_
