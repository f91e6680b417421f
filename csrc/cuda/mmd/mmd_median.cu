// The median of squared distances, by radix selection. Distances are not negative, so their bit
// patterns order as integers. A pass computes all distances and counts the next 11 bits (a digit)
// of those whose higher bits equal the median's: 3 passes for float, 6 for double. Only the counts
// are stored, and the host does not wait. Counts are integers, so the order of their atomics is
// free.
//
// Blocks process the tiles of pairs (mmd_tiles.cuh) on and above the diagonal and count in shared
// memory. Few rows are one block and one launch. Else each pass is a launch: its blocks find the
// previous digit from the counts in the workspace and add theirs. Bound by the distances: one
// subtraction and one FMA per element of a pair and pass.
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/mmd/mmd.h"
#include "cuda/mmd/mmd_tiles.cuh"

namespace diffmic::cuda::mmd {
namespace {

constexpr char kOperation[] = "mmd.median_squared_distance";
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kCounts = kDigits + 1;  // the last one counts NaNs

using Count = unsigned long long;  // of pairs; a type of atomicAdd

template <typename T>
using Pattern = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
template <typename T>
constexpr int kSignBit = 8 * sizeof(T) - 1;
template <typename T>
constexpr int kPasses = (kSignBit<T> + kDigitBits - 1) / kDigitBits;

// The median's bits as far as they are known before a pass.
struct Known {
  Count prefix;  // its bits above the digit of the pass
  Count rank;    // its rank among the distances with this prefix
  Count nan;     // the number of NaN distances
};

// The workspace of a pass.
struct PassState {
  Known known;
  Count counts[kCounts];
};

template <typename T>
struct Problem {
  Pool<T> pool;
  double* median;
  PassState* passes;
};

template <typename T>
struct MedianMemory {
  TileMemory<T> tile;
  unsigned counts[kCounts];
};

// The digit of a pass is bits [DigitBegin, DigitEnd).
template <typename T>
__device__ __forceinline__ int DigitBegin(int pass) {
  return max(kSignBit<T> - kDigitBits * (pass + 1), 0);
}
template <typename T>
__device__ __forceinline__ int DigitEnd(int pass) {
  return kSignBit<T> - kDigitBits * pass;
}

template <typename T>
__device__ Known AtFirst(const Pool<T>& pool) {
  const auto rows = static_cast<Count>(pool.rows());
  return {0, (rows * (rows - 1) / 2 - 1) / 2, 0};
}

// Counts the digits of the pass over the block's tiles, in shared memory.
template <bool kShort, typename T>
__device__ void CountDigits(RowTiles<T>& tiles, int pass, Count known_prefix,
                            unsigned (&counts)[kCounts]) {
  for (int i = threadIdx.x; i < kCounts; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int begin = DigitBegin<T>(pass), end = DigitEnd<T>(pass);
  const unsigned mask = (1u << (end - begin)) - 1;
  const auto prefix = static_cast<Pattern<T>>(known_prefix);
  const std::int64_t rows = tiles.pool().rows(), tile_count = (rows + kTile - 1) / kTile;
  for (std::int64_t i = blockIdx.x; i < tile_count; i += gridDim.x) {
    const Range u = RangeOf(i * kTile, rows);
    for (std::int64_t j = i + blockIdx.y; j < tile_count; j += gridDim.y) {
      const Range v = RangeOf(j * kTile, rows);
      Pairs<T> distances;
      Distances<kShort>(tiles, u, v, distances);
      // Consecutive pairs often have the same digit: one atomic per run.
      unsigned last = kCounts, run = 0;
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const int row = RowOf(pair / 4), column = ColumnOf(pair % 4);
        const T distance = distances[pair / 4][pair % 4];
        Pattern<T> bits;
        std::memcpy(&bits, &distance, sizeof bits);
        unsigned digit = static_cast<unsigned>(bits >> begin) & mask;
        if (distance != distance) {
          digit = kDigits;
        } else if (bits >> end != prefix) {
          continue;
        }
        if (column >= v.count || v.begin + column <= u.begin + row || row >= u.count) continue;
        if (digit != last && run > 0) {
          atomicAdd(&counts[last], run);
          run = 0;
        }
        last = digit;
        ++run;
      }
      if (run > 0) atomicAdd(&counts[last], run);
    }
  }
  __syncthreads();
}

// Appends the digit that contains `rank` to the prefix. Called by all threads of the block.
template <typename T, typename Counts>
__device__ Known Append(Known known, int pass, const Counts* counts) {
  constexpr int kEach = kDigits / kThreads;
  __shared__ Count of_warps[kWarps];
  __shared__ Known found;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int digit = static_cast<int>(threadIdx.x) * kEach;
  Count own = 0;
  for (int i = 0; i < kEach; ++i) own += counts[digit + i];
  Count below = own;  // an inclusive prefix sum over the warp
  for (int offset = 1; offset < 32; offset *= 2) {
    const Count other = __shfl_up_sync(0xFFFFFFFF, below, offset);
    if (lane >= offset) below += other;
  }
  if (lane == 31) of_warps[warp] = below;
  if (threadIdx.x == 0) found = {0, 0, counts[kDigits]};  // if all are NaN there is no digit
  __syncthreads();
  below -= own;
  for (int i = 0; i < warp; ++i) below += of_warps[i];
  if (known.rank >= below && known.rank < below + own) {
    const int bits = DigitEnd<T>(pass) - DigitBegin<T>(pass);
    int i = 0;
    for (known.rank -= below; known.rank >= counts[digit + i]; ++i) known.rank -= counts[digit + i];
    found.prefix = known.prefix << bits | static_cast<Count>(digit + i);
    found.rank = known.rank;
  }
  __syncthreads();
  return found;
}

template <typename T>
__device__ void Write(const Known& known, double* median) {
  if (threadIdx.x != 0) return;
  const auto bits = static_cast<Pattern<T>>(known.prefix);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  *median = known.nan > 0 ? static_cast<double>(NAN) : static_cast<double>(value);
}

template <typename T>
__device__ __forceinline__ unsigned (&SharedCounts())
    [kCounts] { return reinterpret_cast<MedianMemory<T>*>(dynamic_shared)->counts; }

// All passes, by one block.
template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, 1) MedianKernel(Problem<T> p) {
  RowTiles<T> tiles(p.pool);
  Known known = AtFirst(p.pool);
  for (int pass = 0; pass < kPasses<T>; ++pass) {
    CountDigits<kShort>(tiles, pass, known.prefix, SharedCounts<T>());
    known = Append<T>(known, pass, SharedCounts<T>());
    __syncthreads();  // `found` and the counts have been read
  }
  Write<T>(known, p.median);
}

// One pass, or after the last one the median.
template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>) PassKernel(Problem<T> p, int pass) {
  Known known = AtFirst(p.pool);
  if (pass > 0) {
    const PassState& before = p.passes[pass - 1];
    known = Append<T>(before.known, pass - 1, before.counts);
  }
  if (pass == kPasses<T>) return Write<T>(known, p.median);
  PassState& own = p.passes[pass];
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) own.known = known;
  RowTiles<T> tiles(p.pool);
  auto& counts = SharedCounts<T>();
  CountDigits<kShort>(tiles, pass, known.prefix, counts);
  for (int i = threadIdx.x; i < kCounts; i += kThreads) {
    if (counts[i] > 0) atomicAdd(&own.counts[i], Count{counts[i]});
  }
}

constexpr std::int64_t kFewTiles = 2;  // row tiles of one block, at most

}  // namespace

std::int64_t MedianWorkspace(std::int64_t n, std::int64_t m, std::int64_t element_bytes) {
  if (TilesOf(n + m) <= kFewTiles) return 0;
  const int passes = element_bytes == 4 ? kPasses<float> : kPasses<double>;
  return passes * static_cast<std::int64_t>(sizeof(PassState) / 8);
}

template <typename T>
void MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, double* median,
                           std::uint64_t* workspace, cudaStream_t stream) {
  const bool is_short = x.width <= kDepth<T>;
  const std::int64_t tiles = TilesOf(x.count + y.count);
  const Problem<T> problem{Pool<T>(x, y), median, reinterpret_cast<PassState*>(workspace)};
  constexpr std::size_t kShared = sizeof(MedianMemory<T>);
  if (tiles <= kFewTiles) {
    return Launch(kOperation, is_short ? MedianKernel<true, T> : MedianKernel<false, T>,
                  {dim3(1), dim3(kThreads), kShared, stream}, problem);
  }
  Check(cudaMemsetAsync(workspace, 0, kPasses<T> * sizeof(PassState), stream), kOperation,
        "cudaMemsetAsync");
  const auto kernel = is_short ? PassKernel<true, T> : PassKernel<false, T>;
  // A block counts one row tile: less than 2^32 pairs for up to 2^26 rows in total.
  const dim3 grid(static_cast<unsigned>(tiles), Splits(tiles, tiles));
  for (int pass = 0; pass < kPasses<T>; ++pass) {
    Launch(kOperation, kernel, {grid, dim3(kThreads), kShared, stream}, problem, pass);
  }
  Launch(kOperation, kernel, {dim3(1), dim3(kThreads), kShared, stream}, problem, kPasses<T>);
}

#define DIFFMIC_INSTANTIATE(T)                                                        \
  template void MedianSquaredDistance<T>(const Matrix<T>&, const Matrix<T>&, double*, \
                                         std::uint64_t*, cudaStream_t);
DIFFMIC_INSTANTIATE(float)
DIFFMIC_INSTANTIATE(double)
#undef DIFFMIC_INSTANTIATE

}  // namespace diffmic::cuda::mmd
