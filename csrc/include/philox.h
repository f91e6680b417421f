// Counter-based standard normal noise (docs/algorithm.md, "Philox noise"): Philox4x32-10 (Salmon et
// al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and Box-Muller, for host and device.
//
//   key      seed[0:32], seed[32:64]
//   counter  image[0:32], image[32:64], sample, timestep << 12 | class / 4
//
// The four words of one counter give four normals: words 0 and 1 those of classes 4b and 4b + 1,
// words 2 and 3 those of classes 4b + 2 and 4b + 3. Bitwise identical to
// diffmic_fast/reference/philox.py: the transform uses only float64 additions, multiplications,
// divisions and one square root, each rounded on its own, in the same order. Host code must be
// compiled with -ffp-contract=off; device code uses rounding intrinsics, so no flag matters.
//
// Arithmetic: a counter takes 20 32-bit multiplications and about 140 float64 operations for 16
// bytes of normals: bound by arithmetic, and meant to be used from registers.
#ifndef DIFFMIC_PHILOX_H_
#define DIFFMIC_PHILOX_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DIFFMIC_HOST_DEVICE __host__ __device__
#else
#define DIFFMIC_HOST_DEVICE
#endif

namespace diffmic::philox {

inline constexpr std::int64_t kMaxTimestep = (std::int64_t{1} << 20) - 1;
inline constexpr std::int64_t kMaxClasses = std::int64_t{4} << 12;
inline constexpr std::int64_t kMaxSample = 0xFFFFFFFF;

struct Words {
  std::uint32_t w[4];
};

struct Normals {
  float z[4];
};

namespace internal {

DIFFMIC_HOST_DEVICE inline double Add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

DIFFMIC_HOST_DEVICE inline double Multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

DIFFMIC_HOST_DEVICE inline double Divide(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

DIFFMIC_HOST_DEVICE inline double SquareRoot(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// ln m = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), s = (m - 1) / (m + 1). Argument: s^2.
DIFFMIC_HOST_DEVICE inline double LogSeries(double square) {
  double value = 1.0 / 21.0;
  value = Add(Multiply(value, square), 1.0 / 19.0);
  value = Add(Multiply(value, square), 1.0 / 17.0);
  value = Add(Multiply(value, square), 1.0 / 15.0);
  value = Add(Multiply(value, square), 1.0 / 13.0);
  value = Add(Multiply(value, square), 1.0 / 11.0);
  value = Add(Multiply(value, square), 1.0 / 9.0);
  value = Add(Multiply(value, square), 1.0 / 7.0);
  value = Add(Multiply(value, square), 1.0 / 5.0);
  value = Add(Multiply(value, square), 1.0 / 3.0);
  return Add(Multiply(value, square), 1.0);
}

// Taylor series of sin(x) / x; argument: x^2, |x| <= pi / 4.
DIFFMIC_HOST_DEVICE inline double SinSeries(double square) {
  double value = 1.0 / 355687428096000.0;
  value = Add(Multiply(value, square), -1.0 / 1307674368000.0);
  value = Add(Multiply(value, square), 1.0 / 6227020800.0);
  value = Add(Multiply(value, square), -1.0 / 39916800.0);
  value = Add(Multiply(value, square), 1.0 / 362880.0);
  value = Add(Multiply(value, square), -1.0 / 5040.0);
  value = Add(Multiply(value, square), 1.0 / 120.0);
  value = Add(Multiply(value, square), -1.0 / 6.0);
  return Add(Multiply(value, square), 1.0);
}

// Taylor series of cos(x); argument: x^2.
DIFFMIC_HOST_DEVICE inline double CosSeries(double square) {
  double value = -1.0 / 6402373705728000.0;
  value = Add(Multiply(value, square), 1.0 / 20922789888000.0);
  value = Add(Multiply(value, square), -1.0 / 87178291200.0);
  value = Add(Multiply(value, square), 1.0 / 479001600.0);
  value = Add(Multiply(value, square), -1.0 / 3628800.0);
  value = Add(Multiply(value, square), 1.0 / 40320.0);
  value = Add(Multiply(value, square), -1.0 / 720.0);
  value = Add(Multiply(value, square), 1.0 / 24.0);
  value = Add(Multiply(value, square), -1.0 / 2.0);
  return Add(Multiply(value, square), 1.0);
}

}  // namespace internal

// The uniform words of one counter.
DIFFMIC_HOST_DEVICE inline Words Generate(std::uint64_t seed, std::uint64_t image,
                                          std::uint32_t sample, std::uint32_t last) {
  std::uint32_t c0 = static_cast<std::uint32_t>(image);
  std::uint32_t c1 = static_cast<std::uint32_t>(image >> 32);
  std::uint32_t c2 = sample;
  std::uint32_t c3 = last;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// radius * cos(angle) and radius * sin(angle), with radius = sqrt(-2 ln((first + 1/2) / 2^32)) and
// angle = second / 2^32 turns.
DIFFMIC_HOST_DEVICE inline void BoxMuller(std::uint32_t first, std::uint32_t second, float* along,
                                          float* across) {
  using internal::Add;
  using internal::Divide;
  using internal::Multiply;

  // The uniform number is a normal double in (0, 1): its bits give the mantissa in [1/2, 1) and the
  // exponent, as frexp does.
  const double uniform = Multiply(Add(static_cast<double>(first), 0.5), 1.0 / 4294967296.0);
  std::uint64_t bits;
  std::memcpy(&bits, &uniform, sizeof bits);
  int exponent = static_cast<int>(bits >> 52) - 1022;
  bits = (bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000;
  double mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  if (mantissa < 0.7071067811865476) {
    mantissa = Multiply(mantissa, 2.0);
    exponent -= 1;
  }
  const double ratio = Divide(Add(mantissa, -1.0), Add(mantissa, 1.0));
  const double series = internal::LogSeries(Multiply(ratio, ratio));
  const double log = Add(Multiply(static_cast<double>(exponent), 0.6931471805599453),
                         Multiply(Multiply(ratio, 2.0), series));
  const double radius = internal::SquareRoot(Multiply(log, -2.0));

  // Exact range reduction: a number of quarter turns and a remainder in [-1/8, 1/8) turns.
  const std::uint32_t shifted = second + (std::uint32_t{1} << 29);
  const std::uint32_t quarter = shifted >> 30;
  const std::int32_t rest =
      static_cast<std::int32_t>(shifted & 0x3FFFFFFF) - (std::int32_t{1} << 29);
  const double angle =
      Multiply(Multiply(static_cast<double>(rest), 1.0 / 1073741824.0), 1.5707963267948966);
  const double square = Multiply(angle, angle);
  const double sine = Multiply(angle, internal::SinSeries(square));
  const double cosine = internal::CosSeries(square);
  double turned_cosine = (quarter & 1) ? sine : cosine;
  double turned_sine = (quarter & 1) ? cosine : sine;
  if (quarter == 1 || quarter == 2) turned_cosine = -turned_cosine;
  if (quarter >= 2) turned_sine = -turned_sine;
  *along = static_cast<float>(Multiply(radius, turned_cosine));
  *across = static_cast<float>(Multiply(radius, turned_sine));
}

// The four normals of classes 4 * block ... 4 * block + 3.
DIFFMIC_HOST_DEVICE inline Normals Normal(std::uint64_t seed, std::uint64_t image,
                                          std::uint32_t sample, std::uint32_t timestep,
                                          std::uint32_t block) {
  const Words words = Generate(seed, image, sample, timestep << 12 | block);
  Normals normals;
  BoxMuller(words.w[0], words.w[1], &normals.z[0], &normals.z[1]);
  BoxMuller(words.w[2], words.w[3], &normals.z[2], &normals.z[3]);
  return normals;
}

}  // namespace diffmic::philox

#endif  // DIFFMIC_PHILOX_H_
