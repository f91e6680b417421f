// The kernels of mmd_tiles.h for one instruction set: squared distances of a tile of pairs, kernel
// values, and gradients. The including file defines DIFFMIC_MMD_NAMESPACE and DIFFMIC_MMD_BYTES,
// the size of a vector, and is compiled for the instruction set. No inline function of the standard
// library may be called here: the linker keeps one copy of such a function, possibly one that an
// older processor cannot run.
//
// Layout: rows v are packed into panels of kPanel columns, element by element of k; rows u are
// broadcast. Vectors are those of the compiler (vector_size), not of common/simd.h: one source
// serves float and double, and the compiler may fuse multiply-adds (-ffp-contract=fast), which
// simd.h never does by itself.
//
// Arithmetic: distances are sums of squared differences, not |u|^2 + |v|^2 - 2uv: they are as
// accurate for rows close to each other and far from the origin as for any others, and 0 for equal
// rows. That takes one subtraction per multiply-add, on many processors in a unit of its own; the
// operands come from L1 and L2, so multiply-adds are the bound. The exponential (exponential.h) has
// a relative error below 3e-7 (float; double 1e-15) where it is normal, and is 0 below that. Sums
// are of exp(-z) - 1: the ones cancel in a discrepancy, and would take most of its digits with
// them.
#include <cstdint>
#include <utility>

#include "cpu/mmd/mmd_tiles.h"
#include "include/exponential.h"

namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE {
namespace {

template <typename T>
struct Loops {
  using C = Exponential<T>;
  using Bits = typename C::Bits;
  using Vector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = T;
  using BitVector [[gnu::vector_size(DIFFMIC_MMD_BYTES)]] = Bits;
  static constexpr std::int64_t kWidth = DIFFMIC_MMD_BYTES / sizeof(T);
  // The register block of distances: rows x vectors of columns. Each broadcast value is used for
  // all vectors; there are registers for three with AVX-512.
  static constexpr std::int64_t kBlockRows = 6;
  static constexpr int kColumnVectors = DIFFMIC_MMD_BYTES == 64 ? 3 : 2;
  static constexpr std::int64_t kPanel = kColumnVectors * kWidth;
  // The register block of gradients: rows x vectors of elements.
  static constexpr std::int64_t kGradientRows = 4;
  static constexpr int kGradientVectors = DIFFMIC_MMD_BYTES >= 32 ? 2 : 1;
  // Adding it rounds to an integer.
  static constexpr T kRound = T{3} * (Bits{1} << (C::kMantissa - 1));
  static_assert(kTileColumns % kPanel == 0);
  static_assert(kTileRows % kBlockRows == 0 && kTileRows % kGradientRows == 0);

  static Vector Load(const T* from) {
    Vector value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
  static void Store(T* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

  // In all lanes, by a single load: GCC would fold it into a memory operand of every use.
  static Vector Broadcast(T value) {
    Vector all = value - Vector{};
#if defined(__AVX512F__)
    asm("" : "+v"(all));
#endif
    return all;
  }

  // count < kWidth elements, in pieces of constant sizes.
  static void CopyPart(T* to, const T* from, std::int64_t count) {
#pragma GCC unroll 8
    for (std::int64_t piece = kWidth / 2; piece > 0; piece /= 2) {
      if ((count & piece) == 0) continue;
      __builtin_memcpy(to, from, static_cast<std::size_t>(piece) * sizeof(T));
      to += piece;
      from += piece;
    }
  }

  // The first `count` elements and zeros; zeros alone if count <= 0.
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
  // A stage of the transposition of kWidth vectors: exchanges the lanes whose indices differ in bit
  // kStep between two vectors whose indices do.
  template <int kStep, int... kLane>
  static void Exchange(Vector* a, Vector* b, std::integer_sequence<int, kLane...>) {
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
      if ((i & kStep) == 0)
        Exchange<kStep>(&rows[i], &rows[i + kStep], std::make_integer_sequence<int, kWidth>());
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
          Vector columns_k[kColumnVectors];
#pragma GCC unroll 4
          for (int j = 0; j < kColumnVectors; ++j)
            columns_k[j] = Load(panel + k * kPanel + j * kWidth);
#pragma GCC unroll 6
          for (std::int64_t i = 0; i < kBlockRows; ++i) {
            const Vector row_k = Broadcast(row[i][k]);
#pragma GCC unroll 4
            for (int j = 0; j < kColumnVectors; ++j) {
              const Vector difference = columns_k[j] - row_k;
              sum[i][j] += difference * difference;
            }
          }
        }
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          for (int j = 0; j < kColumnVectors; ++j) {
            T* to = tile + (r + i) * kTileColumns + c + j * kWidth;
            Store(to, first ? sum[i][j] : Load(to) + sum[i][j]);
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

  // 2^n and expm1(r) for -z = n ln 2 + r. NaN propagates: every comparison with it is false.
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

  static void KernelSums(T* tile, std::int64_t rows, std::int64_t columns, bool upper,
                         const KernelArguments<T>& arguments, double* sums) {
    const T share = T{1} / static_cast<T>(arguments.scale_count);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* line = tile + r * kTileColumns;
      const std::int64_t begin = upper ? r / kWidth * kWidth : 0;
      for (std::int64_t c = 0; c < begin; ++c) line[c] = 0;
      Vector row_sum = {};
      for (std::int64_t c = begin; c < columns; c += kWidth) {
        const Vector distance = Load(line + c);
        Vector weight = Load(arguments.column_weights + c);
        if (upper && c < r) {
          for (std::int64_t i = 0; c + i < r; ++i) weight[i] = 0;
        }
        Vector less_one = {}, scaled = {}, kernel = {};
        for (std::int64_t s = 0; s < arguments.scale_count; ++s) {
          const Vector z = distance * arguments.scales[s];
          Vector power, part;
          Split(z, &power, &part);
          const Vector value = z > C::kLimit ? Vector{} : power * part + power;
          less_one += power * part + (power - T{1});  // -1 beyond the limit
          scaled += value * arguments.scales[s];
          kernel += value;
        }
        row_sum += weight * less_one;
        if (arguments.output == TileOutput::kCoefficients) {
          Store(line + c, arguments.row_weights[r] * weight * scaled);
        }
        if (arguments.output == TileOutput::kKernel) Store(line + c, kernel * share);
      }
      double sum = 0;
      for (std::int64_t i = 0; i < kWidth; ++i) sum += static_cast<double>(row_sum[i]);
      sums[r] = sum;
    }
  }

  // high + low += part, exact except for the rounding of `low`. The caller's product is always
  // rounded: GCC does not fuse it with these sums across the branches of LoadPart.
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

  // kVectors vectors of elements from k on: those of all rows v are gathered first, then four rows
  // u at a time are held in registers. One difference serves both gradients, with opposite signs.
  template <bool kToU, bool kToV, int kVectors>
  static void GradientVectors(std::int64_t k, const RowBlock<T>& u, const RowBlock<T>& v,
                              std::int64_t width, const T* tile, bool upper, T factor,
                              const SumRows<T>& u_sums, const SumRows<T>& v_sums) {
    static constexpr T kZeros[kTileColumns] = {};
    Vector v_rows[kTileColumns][kVectors], v_sum[kTileColumns][kVectors];
    for (std::int64_t c = 0; c < v.count; ++c) {
#pragma GCC unroll 2
      for (std::int64_t j = 0; j < kVectors; ++j) {
        const std::int64_t at = k + j * kWidth;
        v_rows[c][j] = LoadPart(v.data + c * v.stride + at, width - at);
        v_sum[c][j] = Vector{};
      }
    }
    for (std::int64_t r = 0; r < u.count; r += kGradientRows) {
      Vector u_rows[kGradientRows][kVectors], u_sum[kGradientRows][kVectors] = {};
      const T* coefficients[kGradientRows];
      for (std::int64_t i = 0; i < kGradientRows; ++i) {
        const bool inside = r + i < u.count;
        for (std::int64_t j = 0; j < kVectors; ++j) {
          const std::int64_t at = k + j * kWidth;
          u_rows[i][j] = LoadPart(u.data + (inside ? r + i : r) * u.stride + at, width - at);
        }
        coefficients[i] = inside ? tile + (r + i) * kTileColumns : kZeros;
      }
      for (std::int64_t c = upper ? r : 0; c < v.count; ++c) {
        Vector column_sum[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) column_sum[j] = v_sum[c][j];
#pragma GCC unroll 4
        for (std::int64_t i = 0; i < kGradientRows; ++i) {
          const Vector coefficient = Broadcast(coefficients[i][c]);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) {
            const Vector difference = v_rows[c][j] - u_rows[i][j];
            if constexpr (kToU) u_sum[i][j] += difference * coefficient;
            if constexpr (kToV) column_sum[j] -= difference * coefficient;
          }
        }
        if constexpr (kToV) {
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) v_sum[c][j] = column_sum[j];
        }
      }
      if constexpr (kToU) {
        for (std::int64_t i = 0; i < kGradientRows && r + i < u.count; ++i) {
          for (std::int64_t j = 0; j < kVectors; ++j) {
            const std::int64_t at = k + j * kWidth;
            AddTo(u_sums, r + i, at, width - at, u_sum[i][j] * factor);
          }
        }
      }
    }
    if constexpr (kToV) {
      for (std::int64_t c = 0; c < v.count; ++c) {
        for (std::int64_t j = 0; j < kVectors; ++j) {
          const std::int64_t at = k + j * kWidth;
          AddTo(v_sums, c, at, width - at, v_sum[c][j] * factor);
        }
      }
    }
  }

  template <bool kToU, bool kToV>
  static void GradientOf(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width,
                         const T* tile, bool upper, T factor, const SumRows<T>& u_sums,
                         const SumRows<T>& v_sums) {
    constexpr std::int64_t kTogether = kGradientVectors * kWidth;
    std::int64_t k = 0;
    for (; k + kTogether - kWidth < width; k += kTogether) {
      GradientVectors<kToU, kToV, kGradientVectors>(k, u, v, width, tile, upper, factor, u_sums,
                                                    v_sums);
    }
    if (k < width)
      GradientVectors<kToU, kToV, 1>(k, u, v, width, tile, upper, factor, u_sums, v_sums);
  }

  static void Gradient(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width,
                       const T* tile, bool upper, T factor, const SumRows<T>& u_sums,
                       const SumRows<T>& v_sums) {
    const bool to_u = u_sums.high != nullptr, to_v = v_sums.high != nullptr;
    if (to_u && to_v) GradientOf<true, true>(u, v, width, tile, upper, factor, u_sums, v_sums);
    if (to_u && !to_v) GradientOf<true, false>(u, v, width, tile, upper, factor, u_sums, v_sums);
    if (!to_u && to_v) GradientOf<false, true>(u, v, width, tile, upper, factor, u_sums, v_sums);
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
  return {&L::Pack, &L::Distances, &L::KernelSums, &L::Gradient, &L::Finish};
}

}  // namespace

constinit const Kernels kKernels = {Table<float>(), Table<double>()};

}  // namespace diffmic::cpu::mmd::DIFFMIC_MMD_NAMESPACE
