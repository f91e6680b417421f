// The kernels of `mmd` on one tile, compiled once per instruction set from mmd_kernel.h.
//
// A tile is kTileRows x kTileColumns pairs of rows (u, v), row-major. Tiles at an edge are computed
// in full: memory past `rows` tile rows is undefined, columns past `columns` have weight 0.
//
// A tile of a block with itself is `upper`: it has the pairs with row <= column. The others have
// weight 0 or are not computed.
#ifndef DIFFMIC_CPU_MMD_MMD_TILES_H_
#define DIFFMIC_CPU_MMD_MMD_TILES_H_

#include <cstdint>

namespace diffmic::cpu::mmd {

inline constexpr std::int64_t kTileRows = 96;  // a multiple of the register blocks
inline constexpr std::int64_t kTileColumns = 96;
// A float accumulator of more squares than this would lose digits.
inline constexpr std::int64_t kChunk = 128;

// Rows of one side: element k of row i is data[i * stride + k].
template <typename T>
struct RowBlock {
  const T* data;
  std::int64_t stride, count;
};

// What kernel_sums replaces the squared distances D of a tile with.
enum class TileOutput {
  kNone,          // undefined
  kCoefficients,  // of `gradient`: row weight * column weight * sum of scale * exp(-scale D)
  kKernel,        // mean over scales of exp(-scale D)
};

template <typename T>
struct KernelArguments {
  const T* row_weights;
  const T* column_weights;  // [kTileColumns]
  const T* scales;
  std::int64_t scale_count;
  TileOutput output;
};

// Accumulators high + low (compensated summation): `low` collects the rounding errors of `high`, so
// that thousands of tiles are summed as if in twice the precision. Null: not wanted.
template <typename T>
struct SumRows {
  T* high;
  T* low;
  std::int64_t stride;
};

template <typename T>
struct TileKernels {
  // panels = the elements [0, depth) of up to kTileColumns rows v, packed for `distances`.
  void (*pack)(const RowBlock<T>& v, std::int64_t depth, T* panels);

  // tile = (first ? 0 : tile) + |u - v|^2 over `depth` elements.
  void (*distances)(const RowBlock<T>& u, const T* panels, std::int64_t columns, std::int64_t depth,
                    bool first, bool upper, T* tile);

  // sums[r] = sum over columns of column weight * sum over scales of (exp(-scale D) - 1).
  void (*kernel_sums)(T* tile, std::int64_t rows, std::int64_t columns, bool upper,
                      const KernelArguments<T>& arguments, double* sums);

  // u_sums[r] += factor * sum over columns of tile * (v - u), and
  // v_sums[c] += factor * sum over rows of tile * (u - v), for rows of `width` elements.
  void (*gradient)(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width, const T* tile,
                   bool upper, T factor, const SumRows<T>& u_sums, const SumRows<T>& v_sums);

  // high += low, for `count` rows.
  void (*finish)(const SumRows<T>& sums, std::int64_t count, std::int64_t width);
};

struct Kernels {
  TileKernels<float> of_float;
  TileKernels<double> of_double;
};

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_TILES_H_
