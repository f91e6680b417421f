// The loops of mmd_tiles.h, for the vectors of one instruction set. The file that includes this
// defines DIFFMIC_MMD_NAMESPACE and DIFFMIC_MMD_BYTES, the size of a vector, and is compiled for
// that instruction set. Nothing here calls an inline function of the standard library: the linker
// keeps one copy of such a function, which may be the one that an older processor cannot run.
//
// Distances are sums of squares of differences, never |u|^2 + |v|^2 - 2uv: they are as exact for
// rows close to each other and far from the origin as for any others, and 0 for equal rows. The
// subtraction is one instruction more for a multiply-add, on many processors in a unit of its own.
//
// The exponential is expm1: -z = n ln 2 + r, |r| <= ln(2) / 2, a Taylor polynomial p of expm1(r),
// and exp(-z) - 1 = 2^n p + (2^n - 1), whose last term is exact. exp(-z) is off by less than
// 3e-7 of itself (float; double 1e-15) where it is normal, and 0 below that. Sums are of
// exp(-z) - 1: the ones cancel in a discrepancy, and with them would go most of its digits.
#include <cstdint>

#include "cpu/mmd_tiles.h"

namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE {
namespace {

template <typename T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = std::int32_t;
  static constexpr float kLimit = 87.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr int kDegree = 7;
};

template <>
struct Constants<double> {
  using Bits = std::int64_t;
  static constexpr double kLimit = 708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr int kDegree = 13;
};

template <typename T>
struct Loops {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  using Vector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = T;
  using BitVector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = Bits;
  static constexpr std::int64_t kWidth = DIFFMIC_MMD_BYTES / sizeof(T);
  static constexpr std::int64_t kPanel = 2 * kWidth;  // columns side by side in registers
  static constexpr std::int64_t kBlockRows = 4;       // rows of a register block of distances
  static constexpr std::int64_t kSlopeRows = 3;       // and of gradients
  static_assert(kTileColumns % kPanel == 0);
  static_assert(kTileRows % kBlockRows == 0 && kTileRows % kSlopeRows == 0);

  static Vector Load(const T* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
  static void Store(T* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

  static void Pack(const T* v, std::int64_t stride, std::int64_t columns, std::int64_t depth,
                   T* panels) {
    for (std::int64_t begin = 0; begin < columns; begin += kPanel) {
      const T* from = v + begin * stride;
      if (begin + kPanel <= columns) {
        for (std::int64_t k = 0; k < depth; ++k) {
          for (std::int64_t c = 0; c < kPanel; ++c) panels[k * kPanel + c] = from[c * stride + k];
        }
      } else {
        for (std::int64_t k = 0; k < depth; ++k) {
          for (std::int64_t c = 0; c < kPanel; ++c) {
            panels[k * kPanel + c] = begin + c < columns ? from[c * stride + k] : T{0};
          }
        }
      }
      panels += depth * kPanel;
    }
  }

  static void Distances(const T* u, std::int64_t stride, std::int64_t rows, const T* panels,
                        std::int64_t columns, std::int64_t depth, bool first, T* tile) {
    for (std::int64_t c = 0; c < columns; c += kPanel) {
      const T* panel = panels + c * depth;
      for (std::int64_t r = 0; r < rows; r += kBlockRows) {
        const T* row[kBlockRows];
        Vector sum[kBlockRows][2];
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          T* place = tile + (r + i) * kTileColumns + c;
          row[i] = u + (r + i < rows ? r + i : rows - 1) * stride;
          sum[i][0] = first ? Vector{} : Load(place);
          sum[i][1] = first ? Vector{} : Load(place + kWidth);
        }
        for (std::int64_t k = 0; k < depth; ++k) {
          const Vector v0 = Load(panel + k * kPanel), v1 = Load(panel + k * kPanel + kWidth);
#pragma GCC unroll 4
          for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const Vector difference0 = v0 - row[i][k], difference1 = v1 - row[i][k];
            sum[i][0] += difference0 * difference0;
            sum[i][1] += difference1 * difference1;
          }
        }
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          T* place = tile + (r + i) * kTileColumns + c;
          Store(place, sum[i][0]);
          Store(place + kWidth, sum[i][1]);
        }
      }
    }
  }

  static constexpr T Inverse(int factorial) {  // 1 / factorial!
    double product = 1;
    for (int i = 2; i <= factorial; ++i) product *= i;
    return static_cast<T>(1 / product);
  }

  // 2^n and expm1(r) of -z = n ln 2 + r. Not-a-number stays one: every comparison with it is false.
  static void Split(Vector z, Vector* power, Vector* part) {
    constexpr T kLog2E = static_cast<T>(1.44269504088896340736);
    const Vector bounded = z > C::kLimit ? Vector{} + C::kLimit : z;
    const Vector shifted = C::kRound - bounded * kLog2E;
    const Vector n = shifted - C::kRound;
    const Vector r = (-bounded - n * C::kLn2High) - n * C::kLn2Low;
    BitVector bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + C::kBias) << C::kMantissa;
    __builtin_memcpy(power, &bits, sizeof bits);
    Vector sum = Vector{} + Inverse(C::kDegree);
#pragma GCC unroll 16
    for (int i = C::kDegree - 1; i > 1; --i) sum = sum * r + Inverse(i);
    *part = sum * (r * r) + r;
  }

  static void Weigh(T* tile, std::int64_t rows, std::int64_t columns, const T* weights,
                    const T* scales, std::int64_t scale_count, Leave leave, double* sums) {
    const T share = T{1} / static_cast<T>(scale_count);
    for (std::int64_t r = 0; r < rows; ++r) {
      Vector row_sum = {};
      for (std::int64_t c = 0; c < columns; c += kWidth) {
        T* place = tile + r * kTileColumns + c;
        const Vector distance = Load(place), weight = Load(weights + c);
        Vector less_one = {}, slope = {}, kernel = {};
        for (std::int64_t s = 0; s < scale_count; ++s) {
          const Vector z = distance * scales[s];
          Vector power, part;
          Split(z, &power, &part);
          const Vector minus_one = z > C::kLimit ? Vector{} - T{1} : power * part + (power - T{1});
          const Vector value = z > C::kLimit ? Vector{} : power * part + power;
          less_one += minus_one;
          slope += value * scales[s];
          kernel += value;
        }
        row_sum += weight * less_one;
        if (leave == Leave::kSlope) Store(place, weight * slope);
        if (leave == Leave::kKernel) Store(place, kernel * share);
      }
      double sum = 0;
      for (std::int64_t i = 0; i < kWidth; ++i) sum += static_cast<double>(row_sum[i]);
      sums[r] = sum;
    }
  }

  static void Gradient(const T* u, const T* v, std::int64_t padded, std::int64_t rows,
                       std::int64_t columns, const T* tile, double factor, double* gradient) {
    for (std::int64_t k = 0; k < padded; k += kPanel) {
      for (std::int64_t r = 0; r < rows; r += kSlopeRows) {
        Vector sum[kSlopeRows][2] = {}, own[kSlopeRows][2];
        const T* slope[kSlopeRows];
        for (std::int64_t i = 0; i < kSlopeRows; ++i) {
          const std::int64_t row = r + i < rows ? r + i : rows - 1;
          own[i][0] = Load(u + row * padded + k);
          own[i][1] = Load(u + row * padded + k + kWidth);
          slope[i] = tile + row * kTileColumns;
        }
        for (std::int64_t c = 0; c < columns; ++c) {
          const Vector v0 = Load(v + c * padded + k), v1 = Load(v + c * padded + k + kWidth);
#pragma GCC unroll 3
          for (std::int64_t i = 0; i < kSlopeRows; ++i) {
            sum[i][0] += (v0 - own[i][0]) * slope[i][c];
            sum[i][1] += (v1 - own[i][1]) * slope[i][c];
          }
        }
        for (std::int64_t i = 0; i < kSlopeRows; ++i) {
          T part[kPanel];
          Store(part, sum[i][0]);
          Store(part + kWidth, sum[i][1]);
          double* to = gradient + (r + i) * padded + k;
          for (std::int64_t c = 0; c < kPanel; ++c) to[c] += factor * static_cast<double>(part[c]);
        }
      }
    }
  }
};

template <typename T>
constexpr TileKernels<T> Table() {
  using L = Loops<T>;
  return {L::kPanel, &L::Pack, &L::Distances, &L::Weigh, &L::Gradient};
}

}  // namespace

constinit const TileKernels<float> kFloat = Table<float>();
constinit const TileKernels<double> kDouble = Table<double>();

}  // namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE
