// The kernel matrix and its gradients, in tiles of pairs (mmd_tiles.cuh).
//
// KernelMatrix: a block computes every gridDim.x-th tile. Bound by the writes, 4 or 8 bytes per
// pair, unless rows are long.
//
// KernelMatrixBackward: a block computes the gradient of 64 rows of x from all of y, or of 64 rows
// of y from all of x, so it is the only one to add to its sums. If several blocks share a row tile,
// each processes every gridDim.y-th tile of the other side, and a second launch adds their partial
// sums. The cotangents of a tile are loaded into shared memory first, along their smaller stride.
// Distances are computed for both sides: two FMAs and two subtractions per element of a pair and
// side, which bound it.
#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/mmd/mmd.h"
#include "cuda/mmd/mmd_gradients.cuh"
#include "cuda/mmd/mmd_tiles.cuh"
#include "cuda/mmd/mmd_values.cuh"

namespace diffmic::cuda::mmd {
namespace {

constexpr char kOperation[] = "mmd.kernel_matrix";

template <typename T>
struct MatrixProblem {
  Pool<T> pool;
  Scales<T> scales;
  T* matrix;
};

template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>) KernelMatrixKernel(MatrixProblem<T> p) {
  const std::int64_t n = p.pool.count[0], m = p.pool.count[1];
  const std::int64_t across = (m + kTile - 1) / kTile,
                     tile_count = (n + kTile - 1) / kTile * across;
  const T first_scale = p.scales.First();
  RowTiles<T> tiles(p.pool);
  for (std::int64_t i = blockIdx.x; i < tile_count; i += gridDim.x) {
    const Range u = RangeOf(i / across * kTile, n);
    const Range v = RangeOf(n + i % across * kTile, n + m);
    Pairs<T> distances;
    Distances<kShort>(tiles, u, v, distances);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (RowOf(r) >= u.count || ColumnOf(c) >= v.count) continue;
        const KernelSums<T> kernels = KernelsOf(p.scales, first_scale, distances[r][c]);
        p.matrix[(u.begin + RowOf(r)) * m + (v.begin - n + ColumnOf(c))] =
            kernels.value / static_cast<T>(p.scales.count);
      }
    }
  }
}

template <typename T>
struct BackwardProblem {
  Pool<T> pool;
  Scales<T> scales;
  const T* cotangent;
  std::int64_t stride[2];
  Gradients<T> gradients;
};

// Loads the cotangents of a tile into slopes; `across` is the stride of its rows, `along` of
// columns.
template <typename T>
__device__ void ReadCotangents(const T* from, std::int64_t across, std::int64_t along, int rows,
                               int columns) {
  auto& slopes = Memory<T>().slopes;
  const bool by_row = abs(along) <= abs(across);
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int row = by_row ? i / kTile : i % kTile, column = by_row ? i % kTile : i / kTile;
    slopes[row][column] =
        row < rows && column < columns ? from[row * across + column * along] : T{0};
  }
}

template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>) BackwardKernel(BackwardProblem<T> p) {
  const std::int64_t n = p.pool.count[0], rows = p.pool.rows();
  const std::int64_t x_tiles = (n + kTile - 1) / kTile;
  const std::int64_t y_tiles = (rows - n + kTile - 1) / kTile;
  const bool of_x = blockIdx.x < x_tiles;
  if (p.gradients.data[of_x ? 0 : 1] == nullptr) return;
  const Range u = of_x ? RangeOf(blockIdx.x * std::int64_t{kTile}, n)
                       : RangeOf(n + (blockIdx.x - x_tiles) * kTile, rows);
  const std::int64_t across = p.stride[of_x ? 0 : 1], along = p.stride[of_x ? 1 : 0];
  const std::int64_t others = of_x ? y_tiles : x_tiles;
  const T first_scale = p.scales.First();
  const T factor = static_cast<T>(2.0 / p.scales.count);
  auto& slopes = Memory<T>().slopes;
  RowTiles<T> tiles(p.pool);
  GradientSums<kShort, T> gradient;
  for (std::int64_t j = blockIdx.y; j < others; j += gridDim.y) {
    const Range v = of_x ? RangeOf(n + j * kTile, rows) : RangeOf(j * kTile, n);
    const T* cotangents = p.cotangent + (of_x ? u.begin : u.begin - n) * across +
                          (of_x ? v.begin - n : v.begin) * along;
    __syncthreads();  // the slopes of the previous tile have been read
    ReadCotangents(cotangents, across, along, u.count, v.count);
    __syncthreads();
    Pairs<T> distances;
    Distances<kShort>(tiles, u, v, distances);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const KernelSums<T> kernels = KernelsOf(p.scales, first_scale, distances[r][c]);
        slopes[RowOf(r)][ColumnOf(c)] *= kernels.slope * factor;
      }
    }
    __syncthreads();
    gradient.Add(tiles, p.gradients, u, v, j < gridDim.y, j + gridDim.y >= others);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) AddSplitsKernel(Gradients<T> gradients) {
  AddSplits(gradients);
}

struct BackwardPlan {
  std::int64_t x_tiles, y_tiles;
  unsigned splits;

  BackwardPlan(std::int64_t n, std::int64_t m)
      : x_tiles(TilesOf(n)),
        y_tiles(TilesOf(m)),
        splits(Splits(x_tiles + y_tiles, std::max(x_tiles, y_tiles))) {}

  // Blocks that share a row tile; each has at least one tile of the other side.
  int SplitsOf(std::int64_t other_tiles) const {
    return static_cast<int>(std::min<std::int64_t>(splits, other_tiles));
  }
};

}  // namespace

template <typename T>
void KernelMatrix(const KernelMatrixCall<T>& call, cudaStream_t stream) {
  const Matrix<T>&x = call.x, &y = call.y;
  constexpr std::int64_t kMostBlocks = std::int64_t{1} << 20;
  const std::int64_t tiles = TilesOf(x.count) * TilesOf(y.count);
  Launch(kOperation,
         x.width <= kDepth<T> ? KernelMatrixKernel<true, T> : KernelMatrixKernel<false, T>,
         {dim3(static_cast<unsigned>(std::min(tiles, kMostBlocks))), dim3(kThreads),
          sizeof(TileMemory<T>), stream},
         MatrixProblem<T>{Pool<T>(x, y), Scales<T>(call.kernel), call.matrix});
}

std::int64_t KernelMatrixWorkspace(std::int64_t n, std::int64_t m, std::int64_t width,
                                   std::int64_t element_bytes) {
  const BackwardPlan plan(n, m);
  const std::int64_t tiles = std::max(plan.x_tiles, plan.y_tiles);
  return (element_bytes == 4 ? PartialBytes<float>(plan.splits, tiles, n + m, width)
                             : PartialBytes<double>(plan.splits, tiles, n + m, width)) /
         8;
}

template <typename T>
void KernelMatrixBackward(const KernelMatrixBackwardCall<T>& call, double* workspace,
                          cudaStream_t stream) {
  const Matrix<T>&x = call.x, &y = call.y;
  const std::int64_t rows = x.count + y.count, width = x.width;
  const BackwardPlan plan(x.count, y.count);
  const Gradients<T> gradients{{call.x_gradient, call.y_gradient},
                               {plan.SplitsOf(plan.y_tiles), plan.SplitsOf(plan.x_tiles)},
                               x.count,
                               rows,
                               width,
                               reinterpret_cast<Sum<T>*>(workspace)};
  Launch(kOperation, width <= kDepth<T> ? BackwardKernel<true, T> : BackwardKernel<false, T>,
         {dim3(static_cast<unsigned>(plan.x_tiles + plan.y_tiles), plan.splits), dim3(kThreads),
          sizeof(TileMemory<T>), stream},
         BackwardProblem<T>{Pool<T>(x, y),
                            Scales<T>(call.kernel),
                            call.cotangent.data,
                            {call.cotangent.stride[0], call.cotangent.stride[1]},
                            gradients});
  if (plan.splits == 1) return;
  Launch(kOperation, AddSplitsKernel<T>,
         {dim3(AddSplitsBlocks(rows, width)), dim3(kThreads), 0, stream}, gradients);
}

#define DIFFMIC_INSTANTIATE(T)                                             \
  template void KernelMatrix<T>(const KernelMatrixCall<T>&, cudaStream_t); \
  template void KernelMatrixBackward<T>(const KernelMatrixBackwardCall<T>&, double*, cudaStream_t);
DIFFMIC_INSTANTIATE(float)
DIFFMIC_INSTANTIATE(double)
#undef DIFFMIC_INSTANTIATE

}  // namespace diffmic::cuda::mmd
