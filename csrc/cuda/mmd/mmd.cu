// The maximum mean discrepancy and its gradients. The pairs of all rows, those of x followed by
// those of y, are divided into tiles (mmd_tiles.cuh). Block (i, s) processes row tile i with every
// gridDim.y-th column tile from s on. The gradients of its rows need all of them; the value needs
// the pairs on and above the diagonal only, which count twice.
//
// The training losses have several y: block (i, s, z) uses y z. For z = 0, whose loss is the mean
// squared error, the threads of the grid stride over the elements.
//
// Launches: one block and one launch for up to 64 rows in total, or 128 short rows. Else the blocks
// write partial sums to the workspace, and a second launch adds them.
//
// Arithmetic: one subtraction and one FMA per element of a pair for the distance, the same for the
// gradient, and about 30 operations per pair for the exponential. The FMAs bound it: a tile loads
// 512 bytes (float) per element of a row, mostly from L2, for 16384 operations.
//
// Precision: distances and kernel values in T, in sums of at most 64 terms. These are added in
// double for the value, and as pairs (high, low) of T for the gradients.
#include <math.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/mmd/mmd.h"
#include "cuda/mmd/mmd_gradients.cuh"
#include "cuda/mmd/mmd_tiles.cuh"
#include "cuda/mmd/mmd_values.cuh"

namespace diffmic::cuda::mmd {
namespace {

template <typename T>
struct Problem {
  Pool<T> pool;
  Weights<T> weights[2];
  Scales<T> scales;
  bool unbiased;
  bool squares;  // the value for y 0 is the mean squared error
  Gradients<T> gradients;
  T* value;      // [gridDim.z]
  double* sums;  // [gridDim.z, 3, blocks], pairs (x, x), (x, y), (y, y); NULL for one block

  __device__ bool SumsSquares() const { return squares && blockIdx.z == 0; }
};

// ---- weights -----------------------------------------------------------------------------------

// Sums of the weights of one side; NaN if they are invalid.
struct Share {
  double sum;
  double pairs;  // sum of the products of weights over the estimator's pairs
  int exponent;  // weights are multiplied by 2^-exponent
};

__device__ double BlockSum(double value) {
  return BlockReduce<kWarps>(value, [](double a, double b) { return a + b; });
}

// Called by all threads of the block. Weights are scaled by a power of two, which is exact, so that
// the largest is in [1, 2) and products of two neither overflow nor underflow.
template <typename T>
__device__ Share ShareOf(const Weights<T>& weights, std::int64_t count, bool unbiased) {
  Share share{};
  double squares = static_cast<double>(count);
  if (weights.data == nullptr) {
    share.sum = static_cast<double>(count);
  } else {
    T most = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
      const T weight = weights.data[i * weights.stride];
      most = weight > most ? weight : most;
    }
    most = BlockReduce<kWarps>(most, [](T a, T b) { return b > a ? b : a; });
    share.exponent = most > 0 && isfinite(most) ? ilogb(most) : 0;
    double positive = 0, negative = 0;  // NaN counts as positive and propagates through the sums
    squares = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
      const double weight =
          static_cast<double>(ldexp(weights.data[i * weights.stride], -share.exponent));
      positive += weight != 0 ? 1 : 0;
      negative += weight < 0 ? 1 : 0;
      share.sum += weight;
      squares += weight * weight;
    }
    share.sum = BlockSum(share.sum);
    squares = BlockSum(squares);
    positive = BlockSum(positive);
    negative = BlockSum(negative);
    if (negative > 0 || positive < (unbiased ? 2 : 1)) share.sum = static_cast<double>(NAN);
  }
  share.pairs = share.sum * share.sum - (unbiased ? squares : 0.0);
  return share;
}

template <typename T>
__device__ __forceinline__ T WeightOf(const Problem<T>& p, const Share (&shares)[2],
                                      std::int64_t row) {
  const std::int64_t border = p.pool.count[0];
  const auto scaled = [](const Weights<T>& weights, std::int64_t i, int exponent) {
    return weights.data == nullptr ? T{1} : ldexp(weights.data[i * weights.stride], -exponent);
  };
  return row < border ? scaled(p.weights[0], row, shares[0].exponent)
                      : scaled(p.weights[1], row - border, shares[1].exponent);
}

// ---- the value ---------------------------------------------------------------------------------

// Sums over pairs; pairs within a side are counted in one order. The sum of squared errors is in
// xy.
struct ValueSums {
  double xx = 0, xy = 0, yy = 0;
};

template <typename T>
__device__ void WriteValue(const Problem<T>& p, const Share (&shares)[2], const ValueSums& sums) {
  if (p.SumsSquares()) {
    p.value[0] = static_cast<T>(sums.xy / static_cast<double>(p.pool.count[0] * p.pool.width));
    return;
  }
  // Means of k - 1 instead of k: the ones cancel.
  const double total = 2 * sums.xx / shares[0].pairs + 2 * sums.yy / shares[1].pairs -
                       2 * sums.xy / (shares[0].sum * shares[1].sum);
  p.value[blockIdx.z] = static_cast<T>(total / p.scales.count);
}

// Called by one thread of a block: writes the value if it is the only block, else its partial sums.
template <typename T>
__device__ void WriteSums(const Problem<T>& p, const Share (&shares)[2], const ValueSums& sums) {
  if (p.sums == nullptr) {
    WriteValue(p, shares, sums);
    return;
  }
  const std::int64_t blocks = std::int64_t{gridDim.x} * gridDim.y;
  double* to = p.sums + 3 * blocks * blockIdx.z + std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  to[0] = sums.xx;
  to[blocks] = sums.xy;
  to[2 * blocks] = sums.yy;
}

// The block's partial sum of the squared errors; also writes their gradient.
template <typename T>
__device__ double SquaredErrors(const Problem<T>& p) {
  const Pool<T>& pool = p.pool;
  const std::int64_t count = pool.count[0] * pool.width;
  const std::int64_t threads = std::int64_t{gridDim.x} * gridDim.y * kThreads;
  const T factor = static_cast<T>(2.0 / static_cast<double>(count));
  double sum = 0;
  for (std::int64_t i =
           (std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
       i < count; i += threads) {
    const std::int64_t row = i / pool.width, element = i % pool.width;
    const T difference = pool.data[1][row * pool.stride[1][0] + element * pool.stride[1][1]] -
                         pool.data[0][row * pool.stride[0][0] + element * pool.stride[0][1]];
    sum += static_cast<double>(difference) * static_cast<double>(difference);
    if (p.gradients.data[1] != nullptr) p.gradients.data[1][i] = factor * difference;
  }
  return BlockSum(sum);
}

// ---- tiles -------------------------------------------------------------------------------------

// The factors of a pair's slope in a gradient, and the first scale.
template <typename T>
struct Factors {
  T within_x, within_y, between;
  T scale;
};

// Adds a tile to the value and, if `slopes`, writes the weighted slopes of its pairs to shared
// memory. A thread stores its distances there first and computes four pairs at a time, since the
// exponentials of 16 pairs would need too many registers.
template <typename T>
__device__ __forceinline__ void Weigh(const Problem<T>& p, const Factors<T>& factors,
                                      const Range& u, const Range& v, const Pairs<T>& distances,
                                      bool slopes) {
  TileMemory<T>& memory = Memory<T>();
  const std::int64_t border = p.pool.count[0];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    memory.slopes[RowOf(i / 4)][ColumnOf(i % 4)] = distances[i / 4][i % 4];
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int row = RowOf(i);
    const bool row_of_x = u.begin + row < border;
    const T row_weight = memory.weights[0][row];
    T to_x = 0, to_y = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = ColumnOf(j);
      const bool column_of_x = v.begin + column < border;
      const T weight = memory.weights[1][column];
      const KernelSums<T> kernels = KernelsOf(p.scales, factors.scale, memory.slopes[row][column]);
      // The pair of a row with itself has distance 0 and adds 0.
      const T part = v.begin + column >= u.begin + row ? weight * kernels.less_one : T{0};
      to_x += column_of_x ? part : T{0};
      to_y += column_of_x ? T{0} : part;
      if (slopes) {
        const T factor = row_of_x != column_of_x ? factors.between
                         : row_of_x              ? factors.within_x
                                                 : factors.within_y;
        memory.slopes[row][column] = row_weight * weight * kernels.slope * factor;
      }
    }
    const double weight = static_cast<double>(row_weight);
    const double from_x = weight * static_cast<double>(to_x);
    const double from_y = weight * static_cast<double>(to_y);
    if (row_of_x) {
      memory.sums[0][threadIdx.x] += from_x;
      memory.sums[1][threadIdx.x] += from_y;
    } else {
      memory.sums[2][threadIdx.x] += from_y;
    }
  }
}

// kShort: width <= kDepth.
template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>) MmdKernel(Problem<T> p) {
  __shared__ Share shares[2];
  for (int side = 0; side < 2; ++side) {
    const Share share = ShareOf(p.weights[side], p.pool.count[side], p.unbiased);
    if (threadIdx.x == 0) shares[side] = share;
  }
  if (p.SumsSquares()) {
    const double sum = SquaredErrors(p);
    if (threadIdx.x == 0) WriteSums(p, shares, {0, sum, 0});
    return;
  }
  TileMemory<T>& memory = Memory<T>();
  // In shared memory to save registers.
  __shared__ Factors<T> factors;
  if (threadIdx.x == 0) {
    const double mean = 4.0 / p.scales.count;
    factors = {static_cast<T>(mean / shares[0].pairs), static_cast<T>(mean / shares[1].pairs),
               static_cast<T>(-mean / (shares[0].sum * shares[1].sum)), p.scales.First()};
  }
  const std::int64_t rows = p.pool.rows();
  const auto tile_count = static_cast<unsigned>((rows + kTile - 1) / kTile);
  RowTiles<T> tiles(p.pool);
  for (int kind = 0; kind < 3; ++kind) memory.sums[kind][threadIdx.x] = 0;
  for (unsigned i = blockIdx.x; i < tile_count; i += gridDim.x) {
    const Range u = RangeOf(std::int64_t{i} * kTile, rows);
    const bool slopes = p.gradients.Wants(u);
    GradientSums<kShort, T> gradient;
    for (unsigned j = blockIdx.y; j < tile_count; j += gridDim.y) {
      if (j < i && !slopes) continue;
      const Range v = RangeOf(std::int64_t{j} * kTile, rows);
      __syncthreads();  // the weights and slopes of the previous tile have been read
      if (threadIdx.x < 2 * kTile) {
        const bool of_u = threadIdx.x < kTile;
        const int row = static_cast<int>(threadIdx.x % kTile);
        memory.weights[of_u ? 0 : 1][row] =
            row < (of_u ? u.count : v.count) ? WeightOf(p, shares, (of_u ? u.begin : v.begin) + row)
                                             : T{0};
      }
      __syncthreads();
      Pairs<T> distances;
      Distances<kShort>(tiles, u, v, distances);
      Weigh(p, factors, u, v, distances, slopes);
      if (!slopes) continue;
      __syncthreads();
      gradient.Add(tiles, p.gradients, u, v, j < gridDim.y, j + gridDim.y >= tile_count);
    }
  }
  const ValueSums sums = {BlockSum(memory.sums[0][threadIdx.x]),
                          BlockSum(memory.sums[1][threadIdx.x]),
                          BlockSum(memory.sums[2][threadIdx.x])};
  if (threadIdx.x == 0) WriteSums(p, shares, sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) FinishKernel(Problem<T> p, std::int64_t blocks) {
  if (!p.SumsSquares()) AddSplits(p.gradients);
  if (blockIdx.x != 0) return;
  const Share shares[2] = {ShareOf(p.weights[0], p.pool.count[0], p.unbiased),
                           ShareOf(p.weights[1], p.pool.count[1], p.unbiased)};
  ValueSums sums;
  const double* const parts = p.sums + 3 * blocks * blockIdx.z;
  for (std::int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sums.xx += parts[i];
    sums.xy += parts[blocks + i];
    sums.yy += parts[2 * blocks + i];
  }
  sums = {BlockSum(sums.xx), BlockSum(sums.xy), BlockSum(sums.yy)};
  if (threadIdx.x == 0) WriteValue(p, shares, sums);
}

// ---- launches ----------------------------------------------------------------------------------

struct Plan {
  std::int64_t blocks;  // row tiles
  unsigned splits;
  bool one;  // a single block
};

template <typename T>
Plan PlanOf(std::int64_t rows, std::int64_t width) {
  const std::int64_t tiles = TilesOf(rows);
  if (tiles == 1 || (tiles == 2 && width <= kDepth<T>)) return {1, 1, true};
  return {tiles, Splits(tiles, tiles), false};
}

// Doubles of the partial sums of the gradients, which come first in the workspace.
template <typename T>
std::int64_t GradientDoubles(const Plan& plan, std::int64_t rows, std::int64_t width) {
  return plan.one ? 0 : PartialBytes<T>(plan.splits, plan.blocks, rows, width) / 8;
}

template <typename T>
std::int64_t WorkspaceDoubles(std::int64_t rows, std::int64_t width, bool gradients) {
  const Plan plan = PlanOf<T>(rows, width);
  return (gradients ? GradientDoubles<T>(plan, rows, width) : 0) +
         (plan.one ? 0 : 3 * plan.blocks * plan.splits);
}

// The arguments of a call other than the rows.
template <typename T>
struct Request {
  Weights<T> x_weights, y_weights;
  const Kernel& kernel;
  bool unbiased, squares;
  T *value, *x_gradient, *y_gradient;
};

template <typename T>
void Run(const char* operation, const Matrix<T>& x, const Stack<T>& ys, const Request<T>& request,
         double* workspace, cudaStream_t stream) {
  const Matrix<T>& y = ys.first;
  const std::int64_t rows = x.count + y.count, width = x.width;
  const Plan plan = PlanOf<T>(rows, width);
  const int splits = static_cast<int>(plan.splits);
  const auto several = static_cast<unsigned>(ys.count);
  const std::int64_t blocks = plan.blocks * splits;
  const bool gradients = request.x_gradient != nullptr || request.y_gradient != nullptr;
  double* const sums =
      plan.one ? nullptr
               : workspace + (gradients ? ys.count * GradientDoubles<T>(plan, rows, width) : 0);
  const Problem<T> problem{Pool<T>(x, y, ys.apart),
                           {request.x_weights, request.y_weights},
                           Scales<T>(request.kernel),
                           request.unbiased,
                           request.squares,
                           {{request.x_gradient, request.y_gradient},
                            {splits, splits},
                            x.count,
                            rows,
                            width,
                            reinterpret_cast<Sum<T>*>(workspace)},
                           request.value,
                           sums};
  Launch(operation, width <= kDepth<T> ? MmdKernel<true, T> : MmdKernel<false, T>,
         {dim3(static_cast<unsigned>(plan.blocks), plan.splits, several), dim3(kThreads),
          sizeof(TileMemory<T>), stream},
         problem);
  if (plan.one) return;
  const unsigned finishing = gradients && splits > 1 ? AddSplitsBlocks(rows, width) : 1;
  Launch(operation, FinishKernel<T>, {dim3(finishing, 1, several), dim3(kThreads), 0, stream},
         problem, blocks);
}

}  // namespace

std::int64_t MmdWorkspace(std::int64_t n, std::int64_t m, std::int64_t width,
                          std::int64_t element_bytes, bool gradients) {
  return element_bytes == 4 ? WorkspaceDoubles<float>(n + m, width, gradients)
                            : WorkspaceDoubles<double>(n + m, width, gradients);
}

std::int64_t NoiseLossesWorkspace(std::int64_t count, std::int64_t n, std::int64_t width,
                                  std::int64_t element_bytes, bool gradients) {
  return count * MmdWorkspace(n, n, width, element_bytes, gradients);
}

template <typename T>
void Mmd(const MmdCall<T>& call, double* workspace, cudaStream_t stream) {
  Run("mmd", call.x, {call.y, 1, 0},
      {call.x_weights, call.y_weights, call.kernel, call.unbiased, false, call.value,
       call.x_gradient, call.y_gradient},
      workspace, stream);
}

template <typename T>
void NoiseLosses(const NoiseLossesCall<T>& call, double* workspace, cudaStream_t stream) {
  const double width = static_cast<double>(call.noise.width);
  const Kernel kernel = {{1 / (width * width)}, nullptr};
  const Weights<T> ones = {nullptr, 0};
  Run("noise_losses", call.noise, call.predictions,
      {ones, ones, kernel, false, true, call.losses, nullptr, call.gradients}, workspace, stream);
}

#define DIFFMIC_INSTANTIATE(T)                                    \
  template void Mmd<T>(const MmdCall<T>&, double*, cudaStream_t); \
  template void NoiseLosses<T>(const NoiseLossesCall<T>&, double*, cudaStream_t);
DIFFMIC_INSTANTIATE(float)
DIFFMIC_INSTANTIATE(double)
#undef DIFFMIC_INSTANTIATE

}  // namespace diffmic::cuda::mmd
