// Maximum mean discrepancy on the CPU. The definition is diffmic_fast/reference/mmd.py.
//
// k(u, v) = mean over scales c of exp(-c |u - v|^2), of rows u, v of two sets;
//   value = mean k(x, x) + mean k(y, y) - 2 mean k(x, y),
// weighted means over all pairs, or over pairs of two different rows within a set (unbiased), and
// the gradients of the value in x and y in the same pass.
//
// Work distribution. The rows of both sets are divided into blocks of 96. Each pair of blocks is
// processed once: their distances become a tile of kernel values, and these become partial
// gradients of both, so that a pair of rows serves both. The pairs follow the rounds of a
// tournament, which give each block one pair at a time, so the bits do not depend on the number of
// threads (mmd_rounds.h). No n x m array exists: memory is one array of the size of the gradients
// for the rounding errors of their sums, and a tile per thread. Rows are copied only if their
// elements are not adjacent.
//
// Arithmetic, for an element of a pair of rows: one subtraction and one multiply-add for the
// distance; one more subtraction and two multiply-adds, of one product, for two gradients; and some
// 30 operations per pair for the exponential. Operands come from the second-level cache: bound by
// the multiply-adds. Kernel values are float sums of at most 96 terms, added up in double; so are
// gradients, as pairs of floats (high and low part).
#ifndef DIFFMIC_CPU_MMD_MMD_H_
#define DIFFMIC_CPU_MMD_MMD_H_

#include "cpu/common/cpu_capabilities.h"
#include "include/mmd_call.h"

namespace diffmic::cpu::mmd {

using cpu::Isa;  // kAuto, kPortable, kAvx2 or kAvx512
using namespace diffmic::mmd;

struct Options {
  Isa isa;
  int threads;
};

enum class Side { kNone, kX, kY };

// Returns the side whose weights are negative or sum to 0, and then writes nothing.
template <typename T>
Side Mmd(const MmdCall<T>& call, const Options& options);

template <typename T>
void NoiseLosses(const NoiseLossesCall<T>& call, const Options& options);

template <typename T>
void KernelMatrix(const KernelMatrixCall<T>& call, const Options& options);

template <typename T>
void KernelMatrixBackward(const KernelMatrixBackwardCall<T>& call, const Options& options);

// The lower median of the squared distances between different rows of x and y together, found by
// counting digits of their bit patterns: distances are computed two to six times and never stored.
// NaN if one of them is.
template <typename T>
double MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, const Options& options);

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_H_
