// The inner loops of `mmd` on one tile, compiled once for each instruction set from mmd_kernel.h.
//
// A tile is kTileRows x kTileColumns pairs of rows (u, v), row-major. Tiles at an edge are computed
// in full: memory past `rows` tile rows is scratch, columns past `columns` have weight 0.
//
// A tile of rows with themselves is `upper`: only pairs with row <= column are its own. Others have
// weight 0 or are not computed.
#ifndef DIFFMIC_CPU_MMD_MMD_TILES_H_
#define DIFFMIC_CPU_MMD_MMD_TILES_H_

#include <cstdint>

namespace diffmic::cpu::mmd {

inline constexpr std::int64_t kTileRows = 96;  // divisible by the rows of a register block
inline constexpr std::int64_t kTileColumns = 96;
// A float sum of more squares than this at a stretch would lose digits.
inline constexpr std::int64_t kChunk = 128;

// Rows of one side: element k of row i is data[i * stride + k].
template <typename T>
struct RowBlock {
  const T* data;
  std::int64_t stride, count;
};

// What `weigh` leaves in the tile that held squared distances D.
enum class Leave {
  kNothing,  // scratch
  kSlope,    // row weight * column weight * sum over scales of scale * exp(-scale D)
  kKernel,   // mean over scales of exp(-scale D)
};

template <typename T>
struct Weighing {
  const T* row_weights;
  const T* column_weights;  // kTileColumns of them
  const T* scales;
  std::int64_t scale_count;
  Leave leave;
};

// A sum kept as high + low, `stride` elements from row to row: what rounding takes from `high` goes
// into `low`, so that thousands of tiles add up as if in twice the digits. NULL: not wanted.
template <typename T>
struct SumRows {
  T* high;
  T* low;
  std::int64_t stride;
};

template <typename T>
struct TileKernels {
  // panels = the elements [0, depth) of up to kTileColumns rows v, transposed for `distances`.
  void (*pack)(const RowBlock<T>& v, std::int64_t depth, T* panels);

  // tile = (first ? 0 : tile) + |u - v|^2 over `depth` elements.
  void (*distances)(const RowBlock<T>& u, const T* panels, std::int64_t columns, std::int64_t depth,
                    bool first, bool upper, T* tile);

  // sums[r] = sum over columns of weight * sum over scales of (exp(-scale D) - 1), the weight being
  // the column's alone.
  void (*weigh)(T* tile, std::int64_t rows, std::int64_t columns, bool upper,
                const Weighing<T>& weighing, double* sums);

  // u_sums[r] += factor * sum over columns of tile * (v - u), and
  // v_sums[c] += factor * sum over rows of tile * (u - v); `width` is that of u and v.
  void (*gradient)(const RowBlock<T>& u, const RowBlock<T>& v, std::int64_t width, const T* tile,
                   bool upper, T factor, const SumRows<T>& u_sums, const SumRows<T>& v_sums);

  // high += low, of `count` rows.
  void (*finish)(const SumRows<T>& sums, std::int64_t count, std::int64_t width);
};

namespace portable {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace avx2
namespace avx512 {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace avx512
#endif

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_TILES_H_
