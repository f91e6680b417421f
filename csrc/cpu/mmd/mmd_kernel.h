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

#include "cpu/mmd/mmd_tiles.h"
#include "include/exponential.h"

namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE {
namespace {

// The numbers of a vector's lanes, 0 to kCount - 1.
template <int...>
struct Sequence {};
template <int kCount, int... kRest>
struct Counted : Counted<kCount - 1, kCount - 1, kRest...> {};
template <int... kAll>
struct Counted<0, kAll...> {
  using Type = Sequence<kAll...>;
};
template <std::int64_t kCount>
using MakeSequence = typename Counted<static_cast<int>(kCount)>::Type;

template <typename T>
struct Loops {
  using C = Exponential<T>;
  using Bits = typename C::Bits;
  using Vector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = T;
  using BitVector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = Bits;
  static constexpr std::int64_t kWidth = DIFFMIC_MMD_BYTES / sizeof(T);
  // A register block of distances: rows, and vectors of columns beside each other. A value that is
  // broadcast serves all of these, and 512 bits have the registers for three.
  static constexpr std::int64_t kBlockRows = 6;
  static constexpr int kColumnVectors = DIFFMIC_MMD_BYTES == 64 ? 3 : 2;
  static constexpr std::int64_t kPanel = kColumnVectors * kWidth;
  // And of gradients: rows, and vectors of elements beside each other.
  static constexpr std::int64_t kSlopeRows = 4;
  static constexpr int kSlopeVectors = DIFFMIC_MMD_BYTES >= 32 ? 2 : 1;
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

  // In all lanes. One load then serves every use; GCC would make an operand of each.
  static Vector Broadcast(T value) {
    Vector all = value - Vector{};
#if defined(__AVX512F__)
    asm("" : "+v"(all));
#endif
    return all;
  }

  // count < kWidth elements, in pieces of sizes that the compiler knows.
  static void CopyPart(T* to, const T* from, std::int64_t count) {
#pragma GCC unroll 8
    for (std::int64_t piece = kWidth / 2; piece > 0; piece /= 2) {
      if ((count & piece) == 0) continue;
      __builtin_memcpy(to, from, static_cast<std::size_t>(piece) * sizeof(T));
      to += piece;
      from += piece;
    }
  }

  // The first `count` elements, 0 after them; none where count <= 0.
  static Vector LoadPart(const T* from, std::int64_t count) {
    if (count >= kWidth) return Load(from);
    T values[kWidth] = {};
    CopyPart(values, from, count);
    return Load(values);
  }
  static void StorePart(T* to, Vector value, std::int64_t count) {
    if (count >= kWidth) return Store(to, value);
    T values[kWidth];
    Store(values, value);
    CopyPart(to, values, count);
  }

  // ---- distances

#if __has_builtin(__builtin_shufflevector)
  // A step of the transposition of kWidth vectors: lanes whose numbers differ in the bit kStep
  // change places between two vectors whose numbers do.
  template <int kStep, int... kLane>
  static void Exchange(Vector* a, Vector* b, Sequence<kLane...>) {
    constexpr int kCount = kWidth;
    const Vector low =
        __builtin_shufflevector(*a, *b, (kLane & kStep ? kCount + kLane - kStep : kLane)...);
    *b = __builtin_shufflevector(*a, *b, (kLane & kStep ? kCount + kLane : kLane + kStep)...);
    *a = low;
  }
  template <int kStep = kWidth / 2>
  static void Transpose(Vector* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if ((i & kStep) == 0) Exchange<kStep>(&rows[i], &rows[i + kStep], MakeSequence<kWidth>());
    }
    if constexpr (kStep > 1) Transpose<kStep / 2>(rows);
  }
#else
  static void Transpose(Vector* rows) {
    for (int i = 0; i < kWidth; ++i) {
      for (int k = 0; k < i; ++k) {
        const T value = rows[i][k];
        rows[i][k] = rows[k][i];
        rows[k][i] = value;
      }
    }
  }
#endif

  static void Pack(const RowBlock<T>& v, std::int64_t depth, T* panels) {
    for (std::int64_t begin = 0; begin < v.count; begin += kPanel) {
      const T* from = v.data + begin * v.stride;
      std::int64_t k = 0;
      if (begin + kPanel <= v.count) {
        for (; k + kWidth <= depth; k += kWidth) {
          for (std::int64_t c = 0; c < kPanel; c += kWidth) {
            Vector part[kWidth];
#pragma GCC unroll 16
            for (std::int64_t i = 0; i < kWidth; ++i) part[i] = Load(from + (c + i) * v.stride + k);
            Transpose(part);
#pragma GCC unroll 16
            for (std::int64_t i = 0; i < kWidth; ++i) Store(panels + (k + i) * kPanel + c, part[i]);
          }
        }
      }
      for (; k < depth; ++k) {
        for (std::int64_t c = 0; c < kPanel; ++c) {
          panels[k * kPanel + c] = begin + c < v.count ? from[c * v.stride + k] : T{0};
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
        Vector sum[kBlockRows][kColumnVectors] = {};
        for (std::int64_t k = 0; k < depth; ++k) {
          Vector there[kColumnVectors];
#pragma GCC unroll 4
          for (int j = 0; j < kColumnVectors; ++j) there[j] = Load(panel + k * kPanel + j * kWidth);
#pragma GCC unroll 6
          for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const Vector own = Broadcast(row[i][k]);
#pragma GCC unroll 4
            for (int j = 0; j < kColumnVectors; ++j) {
              const Vector difference = there[j] - own;
              sum[i][j] += difference * difference;
            }
          }
        }
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          for (int j = 0; j < kColumnVectors; ++j) {
            T* place = tile + (r + i) * kTileColumns + c + j * kWidth;
            Store(place, first ? sum[i][j] : Load(place) + sum[i][j]);
          }
        }
      }
    }
  }

  // ---- kernel values

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

  // high + low += part, exactly but for the rounding of `low`. The caller's product is rounded for
  // every row: GCC does not fuse it with these sums across the branches of LoadPart.
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

  // kVectors vectors of elements from k on: they are gathered from all rows v, and walked over by
  // four rows u in registers. A difference serves both sums, which differ in its sign alone.
  template <bool kToU, bool kToV, int kVectors>
  static void SlopesOf(std::int64_t k, const RowBlock<T>& u, const RowBlock<T>& v,
                       std::int64_t width, const T* tile, bool upper, T factor,
                       const SumRows<T>& u_sums, const SumRows<T>& v_sums) {
    static constexpr T kZeros[kTileColumns] = {};
    Vector there[kTileColumns][kVectors], back[kTileColumns][kVectors];
    for (std::int64_t c = 0; c < v.count; ++c) {
#pragma GCC unroll 2
      for (std::int64_t j = 0; j < kVectors; ++j) {
        const std::int64_t at = k + j * kWidth;
        there[c][j] = LoadPart(v.data + c * v.stride + at, width - at);
        back[c][j] = Vector{};
      }
    }
    for (std::int64_t r = 0; r < u.count; r += kSlopeRows) {
      Vector own[kSlopeRows][kVectors], sum[kSlopeRows][kVectors] = {};
      const T* slope[kSlopeRows];
      for (std::int64_t i = 0; i < kSlopeRows; ++i) {
        const bool inside = r + i < u.count;
        for (std::int64_t j = 0; j < kVectors; ++j) {
          const std::int64_t at = k + j * kWidth;
          own[i][j] = LoadPart(u.data + (inside ? r + i : r) * u.stride + at, width - at);
        }
        slope[i] = inside ? tile + (r + i) * kTileColumns : kZeros;
      }
      for (std::int64_t c = upper ? r : 0; c < v.count; ++c) {
        Vector given[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) given[j] = back[c][j];
#pragma GCC unroll 4
        for (std::int64_t i = 0; i < kSlopeRows; ++i) {
          const Vector steep = Broadcast(slope[i][c]);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) {
            const Vector difference = there[c][j] - own[i][j];
            if constexpr (kToU) sum[i][j] += difference * steep;
            if constexpr (kToV) given[j] -= difference * steep;
          }
        }
        if constexpr (kToV) {
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) back[c][j] = given[j];
        }
      }
      if constexpr (kToU) {
        for (std::int64_t i = 0; i < kSlopeRows && r + i < u.count; ++i) {
          for (std::int64_t j = 0; j < kVectors; ++j) {
            const std::int64_t at = k + j * kWidth;
            AddTo(u_sums, r + i, at, width - at, sum[i][j] * factor);
          }
        }
      }
    }
    if constexpr (kToV) {
      for (std::int64_t c = 0; c < v.count; ++c) {
        for (std::int64_t j = 0; j < kVectors; ++j) {
          const std::int64_t at = k + j * kWidth;
          AddTo(v_sums, c, at, width - at, back[c][j] * factor);
        }
      }
    }
  }

  template <bool kToU, bool kToV>
  static void Slopes(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width, const T* tile,
                     bool upper, T factor, const SumRows<T>& u_sums, const SumRows<T>& v_sums) {
    constexpr std::int64_t kTogether = kSlopeVectors * kWidth;
    std::int64_t k = 0;
    for (; k + kTogether - kWidth < width; k += kTogether) {
      SlopesOf<kToU, kToV, kSlopeVectors>(k, u, v, width, tile, upper, factor, u_sums, v_sums);
    }
    if (k < width) SlopesOf<kToU, kToV, 1>(k, u, v, width, tile, upper, factor, u_sums, v_sums);
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
