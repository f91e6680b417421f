// The inner loops of `mmd` on one tile, compiled once for each instruction set from mmd_kernel.h.
//
// A tile is kTileRows x kTileColumns pairs of rows (u, v), row-major. Tiles at an edge are computed
// in full: memory past `rows` tile rows is scratch, columns past `columns` have weight 0.
#ifndef DIFFMIC_CPU_MMD_TILES_H_
#define DIFFMIC_CPU_MMD_TILES_H_

#include <cstdint>

namespace diffmic::cpu::mmd {

inline constexpr std::int64_t kTileRows = 96;  // divisible by the rows of both register blocks
inline constexpr std::int64_t kTileColumns = 128;
// A float sum of more squares than this at a stretch would lose digits.
inline constexpr std::int64_t kChunk = 128;

// What `weigh` leaves in the tile that held squared distances D.
enum class Leave {
  kNothing,  // scratch
  kSlope,    // weight * sum over scales of scale * exp(-scale D)
  kKernel,   // mean over scales of exp(-scale D)
};

template <typename T>
struct TileKernels {
  // Rows of the pooled copy are padded with zeros to a multiple of this many elements.
  std::int64_t padding;

  // panels = the elements [0, depth) of up to kTileColumns rows v, transposed for `distances`.
  void (*pack)(const T* v, std::int64_t stride, std::int64_t columns, std::int64_t depth,
               T* panels);

  // tile = (first ? 0 : tile) + |u - v|^2 over `depth` elements.
  void (*distances)(const T* u, std::int64_t stride, std::int64_t rows, const T* panels,
                    std::int64_t columns, std::int64_t depth, bool first, T* tile);

  // sums[r] = sum over columns of weight * sum over scales of (exp(-scale D) - 1).
  void (*weigh)(T* tile, std::int64_t rows, std::int64_t columns, const T* weights, const T* scales,
                std::int64_t scale_count, Leave leave, double* sums);

  // gradient[r] += factor * sum over columns of tile * (v - u). The gradient's rows are `padded`
  // elements apart, a multiple of `padding`, and its row count is a multiple of 12.
  void (*gradient)(const T* u, const T* v, std::int64_t padded, std::int64_t rows,
                   std::int64_t columns, const T* tile, double factor, double* gradient);
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

#endif  // DIFFMIC_CPU_MMD_TILES_H_
