// Maximum mean discrepancy on a GPU. The definition is diffmic_fast/reference/mmd.py, the CPU's
// counterpart csrc/cpu/mmd/mmd.h.
//
// Nothing here synchronises with the host. What the host cannot know is therefore no error but
// makes all results NaN: weights that are negative or sum to 0, and a median of 0. Results have the
// same bits in every run: all sums are in fixed orders.
//
// A workspace is device memory that the caller allocated, with any contents.
#ifndef DIFFMIC_CUDA_MMD_MMD_H_
#define DIFFMIC_CUDA_MMD_MMD_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "include/mmd_call.h"

namespace diffmic::cuda::mmd {

using namespace diffmic::mmd;

inline constexpr int kMaxScales = 256;            // which are kernel parameters
inline constexpr std::int64_t kMaxStack = 65535;  // the third dimension of a grid

// Doubles of workspace for Mmd, for NoiseLosses of `count` predictions [n, width], and for
// KernelMatrixBackward; often 0.
std::int64_t MmdWorkspace(std::int64_t n, std::int64_t m, std::int64_t width,
                          std::int64_t element_bytes, bool gradients);
std::int64_t NoiseLossesWorkspace(std::int64_t count, std::int64_t n, std::int64_t width,
                                  std::int64_t element_bytes, bool gradients);
std::int64_t KernelMatrixWorkspace(std::int64_t n, std::int64_t m, std::int64_t width,
                                   std::int64_t element_bytes);

template <typename T>
void Mmd(const MmdCall<T>& call, double* workspace, cudaStream_t stream);

// The losses of all predictions in the same launches.
template <typename T>
void NoiseLosses(const NoiseLossesCall<T>& call, double* workspace, cudaStream_t stream);

template <typename T>
void KernelMatrix(const KernelMatrixCall<T>& call, cudaStream_t stream);

template <typename T>
void KernelMatrixBackward(const KernelMatrixBackwardCall<T>& call, double* workspace,
                          cudaStream_t stream);

// Words of workspace for MedianSquaredDistance, often 0.
std::int64_t MedianWorkspace(std::int64_t n, std::int64_t m, std::int64_t element_bytes);

// Writes the lower median of the squared distances between different rows of x and y together; NaN
// if one of them is. Its bits are those that the CPU finds with fused multiply-adds.
template <typename T>
void MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, double* median,
                           std::uint64_t* workspace, cudaStream_t stream);

}  // namespace diffmic::cuda::mmd

#endif  // DIFFMIC_CUDA_MMD_MMD_H_
