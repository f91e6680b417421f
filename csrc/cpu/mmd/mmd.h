// Maximum mean discrepancy on the CPU. The definition is diffmic_fast/reference/mmd.py.
//
// What is computed. k(u, v) = mean over scales c of exp(-c |u - v|^2), of rows u, v of two sets;
//   value = mean k(x, x) + mean k(y, y) - 2 mean k(x, y),
// weighted means over all pairs, or over pairs of two different rows within a set (unbiased), and
// the gradients of that for x and y in the same pass.
//
// How the work is divided. The rows of both sets are cut into blocks of 96. Every two blocks meet
// once: the tile of their distances is made into kernel values, and these into a part of the
// gradients of both, so a pair of rows is looked at once and serves both. The meetings are in the
// order of a tournament's rounds, which gives every block one at a time, so the bits do not depend
// on the number of threads (mmd_rounds.h). No n x m array exists: memory is one array of the size
// of the gradients, what their sums lose by rounding, and a tile for each thread. Rows are copied
// only where their elements are not next to each other.
//
// Arithmetic, for an element of a pair of rows: one subtraction and one multiply-add for the
// distance; one more subtraction and two multiply-adds, of one product, for two gradients; and some
// 30 operations a pair for the exponential. From the second level of the cache: bound by the
// multiply-adds. Kernel values are float sums of at most 96 terms, added up in double; gradients
// are too, as pairs of floats (high and low part).
#ifndef DIFFMIC_CPU_MMD_MMD_H_
#define DIFFMIC_CPU_MMD_MMD_H_

#include <cstdint>
#include <vector>

#include "cpu/common/cpu_capabilities.h"

namespace diffmic::cpu::mmd {

using cpu::Isa;  // kAuto, kPortable, kAvx2 or kAvx512

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

// One weight a row; data is NULL where all are 1.
template <typename T>
struct Weights {
  const T* data;
  std::int64_t stride;
};

struct Options {
  std::vector<double> scales;  // one or more, each > 0
  bool unbiased;
  Isa isa;
  int threads;
};

enum class Side { kNone, kX, kY };

// Writes the value and, where they are not NULL, the compact gradients. x and y have equal widths,
// both counts and the width are at least 1. Returns the side whose weights are negative or leave
// nothing to divide by, and then writes nothing.
template <typename T>
Side Mmd(const Matrix<T>& x, const Matrix<T>& y, const Weights<T>& x_weights,
         const Weights<T>& y_weights, const Options& options, T* value, T* x_gradient,
         T* y_gradient);

// The training losses of predictions of `noise`, all [n, d]: of the first prediction the mean
// squared error, of each other the biased discrepancy from the noise with c = 1 / d^2, bits as from
// Mmd. gradients [count, n, d] compact, or NULL: of each loss for its prediction.
template <typename T>
void NoiseLosses(const Matrix<T>& noise, const Stack<T>& predictions, Isa isa, int threads,
                 T* losses, T* gradients);

// kernel[i, j] = k(x_i, y_j), compact.
template <typename T>
void KernelMatrix(const Matrix<T>& x, const Matrix<T>& y, const Options& options, T* kernel);

// The compact gradients (or NULL) of sum(cotangent * k(x, y)), cotangent [n, m].
template <typename T>
void KernelMatrixBackward(const Matrix<T>& cotangent, const Matrix<T>& x, const Matrix<T>& y,
                          const Options& options, T* x_gradient, T* y_gradient);

// The lower median of the squared distances between different rows of x and y taken together, by
// counting digits of their bit patterns: distances are computed two to six times and never stored.
// Not-a-number where one of them is.
template <typename T>
double MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, Isa isa, int threads);

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_H_
