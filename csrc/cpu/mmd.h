// Maximum mean discrepancy on the CPU. The definition is diffmic_fast/reference/mmd.py.
//
// What is computed. k(u, v) = mean over scales c of exp(-c |u - v|^2), of rows u, v of two sets;
//   value = mean k(x, x) + mean k(y, y) - 2 mean k(x, y),
// weighted means over all pairs, or over pairs of two different rows within a set (unbiased), and
// the gradients of that for x and y in the same pass.
//
// How the work is divided. Both sets are copied into one array of padded rows. A block of 96 rows
// belongs to one thread at a time, which walks over tiles of 128 other rows: distances, kernel, and
// the tile's part of the block's gradient. Every sum of a block is its own, and the blocks' sums
// are added in their order, so the bits do not depend on the number of threads. No n x m array
// exists: memory is the copy and, for each thread, two tiles and a block's gradient.
//
// Arithmetic, in pairs of elements: a row with a gradient meets all rows, one subtraction and one
// multiply-add for the distance, the same again for the gradient, and some 20 operations a pair for
// the exponential. Without gradients each pair is visited once. From the second level of the cache:
// bound by the multiply-adds. Kernel values are float sums of at most 128 terms, added up in
// double; so are gradients.
#ifndef DIFFMIC_CPU_MMD_H_
#define DIFFMIC_CPU_MMD_H_

#include <cstdint>
#include <vector>

namespace diffmic::cpu::mmd {

// Which of mmd_tiles.h's compilations runs. kAuto is the widest that the processor has.
enum class Isa { kAuto, kPortable, kAvx2, kAvx512 };

bool Runs(Isa isa);

// [count, width] with strides in elements, any sign, zero included.
template <typename T>
struct Matrix {
  const T* data;
  std::int64_t count, width;
  std::int64_t stride[2];
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

#endif  // DIFFMIC_CPU_MMD_H_
