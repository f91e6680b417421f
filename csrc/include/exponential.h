// Constants of the exponential in the kernels of `mmd`, on CPU and GPU: expm1(-z) with
//   -z = n ln 2 + r, |r| <= ln(2) / 2,   exp(-z) - 1 = 2^n p(r) + (2^n - 1),
// where p is the Taylor polynomial of expm1 and the last term is exact. ln 2 is split in two parts
// (Cody and Waite), so that n times the first one is exact.
#ifndef DIFFMIC_EXPONENTIAL_H_
#define DIFFMIC_EXPONENTIAL_H_

#include <cstdint>

namespace diffmic {

template <typename T>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = std::int32_t;
  static constexpr float kLimit = 87.0f;  // of z; beyond it the exponential is 0
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23;  // bits
  static constexpr Bits kBias = 127;    // of the exponent
  static constexpr int kDegree = 7;     // of p
};

template <>
struct Exponential<double> {
  using Bits = std::int64_t;
  static constexpr double kLimit = 708.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr int kDegree = 13;
};

}  // namespace diffmic

#endif  // DIFFMIC_EXPONENTIAL_H_
