// The loops of mmd_tiles.h, for the vectors of one instruction set. The file that includes this
// defines DIFFMIC_MMD_NAMESPACE and DIFFMIC_MMD_BYTES, the size of a vector, and is compiled for
// that instruction set. Nothing here calls an inline function of the standard library: the linker
// keeps one copy of such a function, which may be the one that an older processor cannot run.
//
// Distances are sums of squares of differences, never |u|^2 + |v|^2 - 2uv: they are as exact for
// rows close to each other and far from the origin as for any others, and 0 for equal rows. The
// subtraction is one instruction more for a multiply-add, on many processors in a unit of its own.
//
// The exponential is that of exponential.h, off by less than 3e-7 of itself (float; double 1e-15)
// where it is normal, and 0 below that. Sums are of exp(-z) - 1: the ones cancel in a discrepancy,
// and with them would go most of its digits.
#include <cstdint>

#include "cpu/mmd_tiles.h"
#include "exponential.h"

namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE {
namespace {

template <typename T>
struct Loops {
  using C = Exponential<T>;
  using Bits = typename C::Bits;
  using Vector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = T;
  using BitVector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = Bits;
  static constexpr std::int64_t kWidth = DIFFMIC_MMD_BYTES / sizeof(T);
  static constexpr std::int64_t kPanel = 2 * kWidth;  // columns side by side in registers
  static constexpr std::int64_t kBlockRows = 6;       // rows of a register block of distances
  static constexpr std::int64_t kSlopeRows = 4;       // and of gradients
  static constexpr T kRound =
      T{3} * (Bits{1} << (C::kMantissa - 1));  // adding it rounds to an integer
  static_assert(kTileColumns % kPanel == 0);
  static_assert(kTileRows % kBlockRows == 0 && kTileRows % kSlopeRows == 0);

  static Vector Load(const T* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
  static void Store(T* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

  // The first `count` elements, 0 after them.
  static Vector LoadPart(const T* from, std::int64_t count) {
    if (count >= kWidth) return Load(from);
    T values[kWidth] = {};
    for (std::int64_t i = 0; i < count; ++i) values[i] = from[i];
    return Load(values);
  }
  static void StorePart(T* to, Vector value, std::int64_t count) {
    if (count >= kWidth) return Store(to, value);
    T values[kWidth];
    Store(values, value);
    for (std::int64_t i = 0; i < count; ++i) to[i] = values[i];
  }

  static void Pack(const RowBlock<T>& v, std::int64_t depth, T* panels) {
    for (std::int64_t begin = 0; begin < v.count; begin += kPanel) {
      const T* from = v.data + begin * v.stride;
      if (begin + kPanel <= v.count) {
        for (std::int64_t k = 0; k < depth; ++k) {
          for (std::int64_t c = 0; c < kPanel; ++c) panels[k * kPanel + c] = from[c * v.stride + k];
        }
      } else {
        for (std::int64_t k = 0; k < depth; ++k) {
          for (std::int64_t c = 0; c < kPanel; ++c) {
            panels[k * kPanel + c] = begin + c < v.count ? from[c * v.stride + k] : T{0};
          }
        }
      }
      panels += depth * kPanel;
    }
  }

  static void Distances(const RowBlock<T>& u, const T* panels, std::int64_t columns,
                        std::int64_t depth, bool first, bool upper, T* tile) {
    for (std::int64_t c = 0; c < columns; c += kPanel) {
      const T* panel = panels + c * depth;
      const std::int64_t rows = upper && c + kPanel < u.count ? c + kPanel : u.count;
      for (std::int64_t r = 0; r < rows; r += kBlockRows) {
        const T* row[kBlockRows];
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          row[i] = u.data + (r + i < u.count ? r + i : u.count - 1) * u.stride;
        }
        Vector sum[kBlockRows][2] = {};
        for (std::int64_t k = 0; k < depth; ++k) {
          const Vector v0 = Load(panel + k * kPanel), v1 = Load(panel + k * kPanel + kWidth);
#pragma GCC unroll 6
          for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const Vector difference0 = v0 - row[i][k], difference1 = v1 - row[i][k];
            sum[i][0] += difference0 * difference0;
            sum[i][1] += difference1 * difference1;
          }
        }
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          T* place = tile + (r + i) * kTileColumns + c;
          Store(place, first ? sum[i][0] : Load(place) + sum[i][0]);
          Store(place + kWidth, first ? sum[i][1] : Load(place + kWidth) + sum[i][1]);
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
    const Vector shifted = kRound - bounded * kLog2E;
    const Vector n = shifted - kRound;
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

  static void Weigh(T* tile, std::int64_t rows, std::int64_t columns, bool upper,
                    const Weighing<T>& weighing, double* sums) {
    const T share = T{1} / static_cast<T>(weighing.scale_count);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* line = tile + r * kTileColumns;
      const std::int64_t begin = upper ? r / kWidth * kWidth : 0;
      for (std::int64_t c = 0; c < begin; ++c) line[c] = 0;
      Vector row_sum = {};
      for (std::int64_t c = begin; c < columns; c += kWidth) {
        const Vector distance = Load(line + c);
        Vector weight = Load(weighing.column_weights + c);
        if (upper && c < r) {
          for (std::int64_t i = 0; c + i < r; ++i) weight[i] = 0;
        }
        Vector less_one = {}, slope = {}, kernel = {};
        for (std::int64_t s = 0; s < weighing.scale_count; ++s) {
          const Vector z = distance * weighing.scales[s];
          Vector power, part;
          Split(z, &power, &part);
          const Vector value = z > C::kLimit ? Vector{} : power * part + power;
          less_one += power * part + (power - T{1});  // -1 beyond the limit
          slope += value * weighing.scales[s];
          kernel += value;
        }
        row_sum += weight * less_one;
        if (weighing.leave == Leave::kSlope) {
          Store(line + c, weighing.row_weights[r] * weight * slope);
        }
        if (weighing.leave == Leave::kKernel) Store(line + c, kernel * share);
      }
      double sum = 0;
      for (std::int64_t i = 0; i < kWidth; ++i) sum += static_cast<double>(row_sum[i]);
      sums[r] = sum;
    }
  }

  // high + low += part, exactly but for the rounding of `low`.
  static void AddTo(const SumRows<T>& sums, std::int64_t row, std::int64_t k, std::int64_t count,
                    Vector part) {
    T* high = sums.high + row * sums.stride + k;
    T* low = sums.low + row * sums.stride + k;
    const Vector before = LoadPart(high, count);
    const Vector after = before + part;
    const Vector added = after - before;
    const Vector lost = (before - (after - added)) + (part - added);
    StorePart(high, after, count);
    StorePart(low, LoadPart(low, count) + lost, count);
  }

  // One vector of elements at a time: it is gathered from all rows v, and walked over by four rows
  // u in registers. A difference serves both sums, which differ in its sign alone.
  template <bool kToU, bool kToV>
  static void Slopes(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width, const T* tile,
                     bool upper, T factor, const SumRows<T>& u_sums, const SumRows<T>& v_sums) {
    static constexpr T kZeros[kTileColumns] = {};
    Vector there[kTileColumns], back[kTileColumns];
    for (std::int64_t k = 0; k < width; k += kWidth) {
      const std::int64_t count = width - k < kWidth ? width - k : kWidth;
      for (std::int64_t c = 0; c < v.count; ++c) {
        there[c] = LoadPart(v.data + c * v.stride + k, count);
        back[c] = Vector{};
      }
      for (std::int64_t r = 0; r < u.count; r += kSlopeRows) {
        Vector own[kSlopeRows], sum[kSlopeRows] = {};
        const T* slope[kSlopeRows];
        for (std::int64_t i = 0; i < kSlopeRows; ++i) {
          const bool inside = r + i < u.count;
          own[i] = LoadPart(u.data + (inside ? r + i : r) * u.stride + k, count);
          slope[i] = inside ? tile + (r + i) * kTileColumns : kZeros;
        }
        for (std::int64_t c = upper ? r : 0; c < v.count; ++c) {
          Vector given = back[c];
#pragma GCC unroll 4
          for (std::int64_t i = 0; i < kSlopeRows; ++i) {
            const Vector push = (there[c] - own[i]) * slope[i][c];
            if constexpr (kToU) sum[i] += push;
            if constexpr (kToV) given -= push;
          }
          if constexpr (kToV) back[c] = given;
        }
        if constexpr (kToU) {
          for (std::int64_t i = 0; i < kSlopeRows && r + i < u.count; ++i) {
            AddTo(u_sums, r + i, k, count, sum[i] * factor);
          }
        }
      }
      if constexpr (kToV) {
        for (std::int64_t c = 0; c < v.count; ++c) AddTo(v_sums, c, k, count, back[c] * factor);
      }
    }
  }

  static void Gradient(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width,
                       const T* tile, bool upper, T factor, const SumRows<T>& u_sums,
                       const SumRows<T>& v_sums) {
    const bool to_u = u_sums.high != nullptr, to_v = v_sums.high != nullptr;
    if (to_u && to_v) Slopes<true, true>(u, v, width, tile, upper, factor, u_sums, v_sums);
    if (to_u && !to_v) Slopes<true, false>(u, v, width, tile, upper, factor, u_sums, v_sums);
    if (!to_u && to_v) Slopes<false, true>(u, v, width, tile, upper, factor, u_sums, v_sums);
  }

  static void Finish(const SumRows<T>& sums, std::int64_t count, std::int64_t width) {
    for (std::int64_t r = 0; r < count; ++r) {
      T* high = sums.high + r * sums.stride;
      const T* low = sums.low + r * sums.stride;
      for (std::int64_t k = 0; k < width; ++k) high[k] += low[k];
    }
  }
};

template <typename T>
constexpr TileKernels<T> Table() {
  using L = Loops<T>;
  return {&L::Pack, &L::Distances, &L::Weigh, &L::Gradient, &L::Finish};
}

}  // namespace

constinit const TileKernels<float> kFloat = Table<float>();
constinit const TileKernels<double> kDouble = Table<double>();

}  // namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE
