// Maximum mean discrepancy on a GPU. The definition is diffmic_fast/reference/mmd.py, the twin
// csrc/cpu/mmd/mmd.h.
//
// Nothing here waits for the device. So what the host cannot know beforehand is no error but makes
// every result not-a-number: weights that are negative or leave nothing to divide by, and a median
// of 0. Results have the same bits in every run: all sums are in fixed orders.
//
// T is float or double. Scratch memory is an array on the device that the caller allocated, with
// any contents.
#ifndef DIFFMIC_CUDA_MMD_MMD_H_
#define DIFFMIC_CUDA_MMD_MMD_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace diffmic::cuda::mmd {

inline constexpr int kMaxScales = 256;  // which are arguments of a launch

// [count, width] with strides in elements, any sign, zero included.
template <typename T>
struct Matrix {
  const T* data;
  std::int64_t count, width;
  std::int64_t stride[2];
};

// Matrices of one shape, `apart` elements from each other.
template <typename T>
struct Stack {
  Matrix<T> first;
  std::int64_t count, apart;
};

inline constexpr std::int64_t kMaxStack = 65535;  // the third dimension of a launch

// One weight a row; data is NULL where all are 1.
template <typename T>
struct Weights {
  const T* data;
  std::int64_t stride;
};

// k(u, v) = mean over scales c of exp(-c |u - v|^2); with a median, on the device, c = 1 / (2
// median) alone.
struct Kernel {
  std::vector<double> scales;  // at most kMaxScales, each > 0; none beside a median
  const double* median;
};

// Doubles of scratch memory that Mmd, NoiseLosses of `count` predictions [n, width], and
// KernelMatrixBackward need, often 0.
std::int64_t MmdScratch(std::int64_t n, std::int64_t m, std::int64_t width,
                        std::int64_t element_bytes, bool gradients);
std::int64_t NoiseLossesScratch(std::int64_t count, std::int64_t n, std::int64_t width,
                                std::int64_t element_bytes, bool gradients);
std::int64_t KernelMatrixScratch(std::int64_t n, std::int64_t m, std::int64_t width,
                                 std::int64_t element_bytes);

// Writes the value and, where they are not NULL, the compact gradients. Counts and width are at
// least 1.
template <typename T>
void Mmd(const Matrix<T>& x, const Matrix<T>& y, const Weights<T>& x_weights,
         const Weights<T>& y_weights, const Kernel& kernel, bool unbiased, T* value, T* x_gradient,
         T* y_gradient, double* scratch, cudaStream_t stream);

// The training losses of predictions of `noise`, all [n, d]: of the first prediction the mean
// squared error, of each other the biased discrepancy from the noise with c = 1 / d^2, bits as from
// Mmd, all in the same launches. gradients [count, n, d] compact, or NULL: of each loss for its
// prediction.
template <typename T>
void NoiseLosses(const Matrix<T>& noise, const Stack<T>& predictions, T* losses, T* gradients,
                 double* scratch, cudaStream_t stream);

// matrix[i, j] = k(x_i, y_j), compact.
template <typename T>
void KernelMatrix(const Matrix<T>& x, const Matrix<T>& y, const Kernel& kernel, T* matrix,
                  cudaStream_t stream);

// The compact gradients (or NULL) of sum(cotangent * k(x, y)), cotangent [n, m].
template <typename T>
void KernelMatrixBackward(const Matrix<T>& cotangent, const Matrix<T>& x, const Matrix<T>& y,
                          const Kernel& kernel, T* x_gradient, T* y_gradient, double* scratch,
                          cudaStream_t stream);

// Words of scratch memory that MedianSquaredDistance needs, often none.
std::int64_t MedianScratch(std::int64_t n, std::int64_t m, std::int64_t element_bytes);

// Writes the lower median of the squared distances between different rows of x and y taken
// together; not-a-number where one of them is. Its bits are those that the CPU finds with fused
// multiply-adds.
template <typename T>
void MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, double* median,
                           std::uint64_t* scratch, cudaStream_t stream);

}  // namespace diffmic::cuda::mmd

#endif  // DIFFMIC_CUDA_MMD_MMD_H_
