// The arguments of `mmd`, which the kernels of the CPU and of CUDA both take. T is float or double.
#ifndef DIFFMIC_INCLUDE_MMD_CALL_H_
#define DIFFMIC_INCLUDE_MMD_CALL_H_

#include <cstdint>
#include <vector>

namespace diffmic::mmd {

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

  Matrix<T> operator[](std::int64_t i) const {
    Matrix<T> matrix = first;
    matrix.data += i * apart;
    return matrix;
  }
};

// One weight per row; data is NULL if all are 1.
template <typename T>
struct Weights {
  const T* data;
  std::int64_t stride;
};

// k(u, v) = mean over scales c of exp(-c |u - v|^2). On a GPU a median, in its memory, may replace
// the scales: c = 1 / (2 median).
struct Kernel {
  std::vector<double> scales;  // each > 0; empty if there is a median
  const double* median;
};

// The discrepancy of x and y, which have equal widths; counts and widths are at least 1, counts at
// least 2 if unbiased.
template <typename T>
struct MmdCall {
  Matrix<T> x, y;
  Weights<T> x_weights, y_weights;
  Kernel kernel;
  bool unbiased;
  T* value;                    // written
  T *x_gradient, *y_gradient;  // compact, written if not NULL
};

// The training losses of predictions of `noise`, all [n, d]: the mean squared error of the first,
// the biased discrepancy from the noise with c = 1 / d^2 of each other, with the bits of MmdCall.
template <typename T>
struct NoiseLossesCall {
  Matrix<T> noise;
  Stack<T> predictions;
  T* losses;     // [count], written
  T* gradients;  // [count, n, d] of each loss in its prediction, written if not NULL
};

// matrix[i, j] = k(x_i, y_j).
template <typename T>
struct KernelMatrixCall {
  Matrix<T> x, y;
  Kernel kernel;
  T* matrix;  // [n, m], written
};

// The gradients of sum(cotangent * k(x, y)), cotangent [n, m].
template <typename T>
struct KernelMatrixBackwardCall {
  Matrix<T> cotangent, x, y;
  Kernel kernel;
  T *x_gradient, *y_gradient;  // compact, written if not NULL
};

}  // namespace diffmic::mmd

#endif  // DIFFMIC_INCLUDE_MMD_CALL_H_
