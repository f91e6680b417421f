// The kernel function of mmd for one squared distance D: the sum over scales c of exp(-c D), of
// exp(-c D) - 1, and of the negative derivative.
#ifndef DIFFMIC_CUDA_MMD_MMD_VALUES_CUH_
#define DIFFMIC_CUDA_MMD_MMD_VALUES_CUH_

#include <math.h>  // fma and rint of every type, under both compilers

#include <cstdint>
#include <cstring>

#include "cuda/mmd/mmd.h"
#include "include/exponential.h"

namespace diffmic::cuda::mmd {

template <typename T>
struct Scales {
  explicit Scales(const Kernel& kernel)
      : median(kernel.median),
        count(median != nullptr ? 1 : static_cast<int>(kernel.scales.size())) {
    for (std::size_t i = 0; i < kernel.scales.size(); ++i) {
      values[i] = static_cast<T>(kernel.scales[i]);
    }
  }

  __device__ T First() const {
    if (median == nullptr) return values[0];
    const double square = *median;
    return static_cast<T>(square == 0 ? static_cast<double>(NAN) : 1 / (2 * square));
  }

  const double* median;
  int count;
  T values[kMaxScales] = {};
};

template <typename T>
__host__ __device__ constexpr T InverseFactorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

template <typename T>
struct KernelSums {
  T less_one = 0;  // sum over scales c of exp(-c D) - 1
  T value = 0;     // of exp(-c D)
  T slope = 0;     // of c exp(-c D)

  // Uses expm1 (include/exponential.h): the discrepancy sums exp(-z) - 1, because the ones cancel
  // and would take most of its digits with them. NaN propagates, since all comparisons with it are
  // false.
  __device__ __forceinline__ void Add(T distance, T scale) {
    using E = Exponential<T>;
    constexpr T kLog2E = static_cast<T>(1.44269504088896340736);
    const T z = distance * scale;
    const T bounded = z > E::kLimit ? E::kLimit : z;
    const T n = rint(-bounded * kLog2E);
    const T r = fma(-n, E::kLn2Low, fma(-n, E::kLn2High, -bounded));
    T part = InverseFactorial<T>(E::kDegree);
#pragma unroll
    for (int i = E::kDegree - 1; i > 1; --i) part = fma(part, r, InverseFactorial<T>(i));
    part = fma(part, r * r, r);
    // If n is NaN the integer is unspecified, but `part` is NaN too.
    const typename E::Bits bits = (static_cast<typename E::Bits>(n) + E::kBias) << E::kMantissa;
    T power;
    std::memcpy(&power, &bits, sizeof power);
    const T kernel = z > E::kLimit ? T{0} : fma(power, part, power);
    less_one += fma(power, part, power - T{1});
    value += kernel;
    slope += kernel * scale;
  }
};

template <typename T>
__device__ __forceinline__ KernelSums<T> KernelsOf(const Scales<T>& scales, T first, T distance) {
  KernelSums<T> sums;
  sums.Add(distance, first);
  for (int s = 1; s < scales.count; ++s) sums.Add(distance, scales.values[s]);
  return sums;
}

}  // namespace diffmic::cuda::mmd

#endif  // DIFFMIC_CUDA_MMD_MMD_VALUES_CUH_
