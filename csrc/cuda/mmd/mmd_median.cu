// The median of squared distances. They have no sign, so their bit patterns, as integers, have
// their order: a pass computes all distances and counts the next 11 bits of those whose bits so far
// are the median's, float 3 times, double 6 times. Nothing is stored but the counts, and the median
// never visits the host. Counts are integers: the order in which they are added does not matter.
//
// Blocks take tiles of pairs (mmd_tiles.cuh), those on and above the diagonal. Each counts in
// shared memory; few rows are one block's, which makes all passes in one launch. Else a pass is a
// launch, whose blocks add their counts to those in scratch memory, and each block of the next
// finds the digit in them for itself. Bound by the distances: a subtraction and a multiply-add an
// element of a pair and pass.
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
constexpr int kCounts = kDigits + 1;  // and behind them, how many are not-a-number

using Count = unsigned long long;  // of pairs; what atomicAdd knows

template <typename T>
using Pattern = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
template <typename T>
constexpr int kSignBit = 8 * sizeof(T) - 1;
template <typename T>
constexpr int kPasses = (kSignBit<T> + kDigitBits - 1) / kDigitBits;

// What is known of the median before a pass.
struct Known {
  Count prefix;  // its bits above the digit of the pass
  Count rank;    // among the distances that have these bits
  Count nan;     // distances that are not a number
};

// Of launches that share the work.
struct Scratch {
  Known known;
  Count counts[kCounts];
};

template <typename T>
struct Problem {
  Pool<T> pool;
  double* median;
  Scratch* scratch;  // of each pass
};

template <typename T>
struct MedianMemory {
  TileMemory<T> tile;
  unsigned counts[kCounts];
};

// The bits of the pass's digit are [DigitBegin, DigitEnd).
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

// Counts the digits of the pass, of the block's tiles, in shared memory.
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
      // Neighbours often have the same digit: one addition for as many as follow each other.
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

// What is known after a pass, for all threads of a block at once: the digit that holds the number
// `rank` of those counted is appended.
template <typename T, typename Counts>
__device__ Known Append(Known known, int pass, const Counts* counts) {
  constexpr int kEach = kDigits / kThreads;
  __shared__ Count of_warps[kWarps];
  __shared__ Known found;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int digit = static_cast<int>(threadIdx.x) * kEach;
  Count own = 0;
  for (int i = 0; i < kEach; ++i) own += counts[digit + i];
  Count below = own;  // counts of this lane's digits and of those before, within the warp
  for (int apart = 1; apart < 32; apart *= 2) {
    const Count other = __shfl_up_sync(0xFFFFFFFF, below, apart);
    if (lane >= apart) below += other;
  }
  if (lane == 31) of_warps[warp] = below;
  if (threadIdx.x == 0)
    found = {0, 0, counts[kDigits]};  // of not-a-numbers alone there is no digit
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

// One pass, or behind the last one, the median.
template <bool kShort, typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>) PassKernel(Problem<T> p, int pass) {
  Known known = AtFirst(p.pool);
  if (pass > 0) {
    const Scratch& before = p.scratch[pass - 1];
    known = Append<T>(before.known, pass - 1, before.counts);
  }
  if (pass == kPasses<T>) return Write<T>(known, p.median);
  Scratch& own = p.scratch[pass];
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) own.known = known;
  RowTiles<T> tiles(p.pool);
  auto& counts = SharedCounts<T>();
  CountDigits<kShort>(tiles, pass, known.prefix, counts);
  for (int i = threadIdx.x; i < kCounts; i += kThreads) {
    if (counts[i] > 0) atomicAdd(&own.counts[i], Count{counts[i]});
  }
}

constexpr std::int64_t kFewTiles = 2;  // of rows, for one block

}  // namespace

std::int64_t MedianScratch(std::int64_t n, std::int64_t m, std::int64_t element_bytes) {
  if (TilesOf(n + m) <= kFewTiles) return 0;
  const int passes = element_bytes == 4 ? kPasses<float> : kPasses<double>;
  return passes * static_cast<std::int64_t>(sizeof(Scratch) / 8);
}

template <typename T>
void MedianSquaredDistance(const Matrix<T>& x, const Matrix<T>& y, double* median,
                           std::uint64_t* scratch, cudaStream_t stream) {
  const bool is_short = x.width <= kDepth<T>;
  const std::int64_t tiles = TilesOf(x.count + y.count);
  const Problem<T> problem{Pool<T>(x, y), median, reinterpret_cast<Scratch*>(scratch)};
  constexpr std::size_t kShared = sizeof(MedianMemory<T>);
  if (tiles <= kFewTiles) {
    return Launch(kOperation, is_short ? MedianKernel<true, T> : MedianKernel<false, T>,
                  {dim3(1), dim3(kThreads), kShared, stream}, problem);
  }
  Check(cudaMemsetAsync(scratch, 0, kPasses<T> * sizeof(Scratch), stream), kOperation,
        "cudaMemsetAsync");
  const auto kernel = is_short ? PassKernel<true, T> : PassKernel<false, T>;
  // A block's counts are of one row tile, less than 2^32 up to 2^26 rows in all.
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
