// Tiles of pairs of rows, shared by the kernels of mmd (docs/algorithm.md, "Maximum mean
// discrepancy").
//
// A block of 256 threads processes 64 x 64 pairs of rows (u, v) at a time, with kDepth elements of
// both sets of rows in shared memory. A thread accumulates the squared distances of 4 x 4 pairs in
// registers, 16 bytes of each row at a time: 8 loads for 4 x 32 operations. For gradients the
// slopes of all pairs are then in shared memory, and a thread accumulates 2 x 4 elements of the
// gradient over the 64 rows v, with eight lanes per row: 6 loads for 64 operations.
//
// The row pitch in shared memory is an odd multiple of 16 bytes, so that eight rows at the same
// element are in different banks.
//
// Distances are sums of squared differences, never |u|^2 + |v|^2 - 2uv: they are accurate for rows
// that are close to each other and far from the origin, and 0 for equal rows.
#ifndef DIFFMIC_CUDA_MMD_MMD_TILES_CUH_
#define DIFFMIC_CUDA_MMD_MMD_TILES_CUH_

#include <math.h>  // fma and abs of every type, under both compilers

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/common/launch.cuh"
#include "cuda/mmd/mmd.h"

namespace diffmic::cuda::mmd {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kTile = 64;
// Minimum blocks per multiprocessor, for __launch_bounds__.
template <typename T>
inline constexpr int kResident = sizeof(T) == 4 ? 2 : 1;
// Squares accumulated before the sum is added to the total: a longer float sum loses accuracy.
inline constexpr int kStretch = 128;

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);
template <typename T>
inline constexpr int kDepth = 8 * kVector<T>;
template <typename T>
inline constexpr int kRowStride = kDepth<T> + kVector<T>;
template <typename T>
inline constexpr int kSlopeStride = kTile + kVector<T>;

template <typename T>
struct alignas(16) TileMemory {
  T rows[2][kTile][kRowStride<T>];
  T slopes[kTile][kSlopeStride<T>];
  T weights[2][kTile];
  double sums[3][kThreads];  // per thread
};

template <typename T>
__device__ __forceinline__ TileMemory<T>& Memory() {
  return *reinterpret_cast<TileMemory<T>*>(dynamic_shared);
}

inline std::int64_t TilesOf(std::int64_t rows) { return (rows + kTile - 1) / kTile; }

// The number of blocks (i, 0), (i, 1), ... that share row tile i; each processes every gridDim.y-th
// column tile. Depends on the sizes only, so that results do not depend on the device.
inline unsigned Splits(std::int64_t row_tiles, std::int64_t column_tiles) {
  constexpr std::int64_t kBlocks = 512;    // about four per multiprocessor of a large GPU
  constexpr std::int64_t kMostSplits = 8;  // each has its own partial sums in the workspace
  const std::int64_t wanted = (kBlocks + row_tiles - 1) / row_tiles;
  return static_cast<unsigned>(std::min({wanted, column_tiles, kMostSplits}));
}

// The rows of x followed by those of y. y is a stack of matrices, `apart` elements from each other,
// of which a block uses number blockIdx.z.
template <typename T>
struct Pool {
  Pool(const Matrix<T>& x, const Matrix<T>& y, std::int64_t apart = 0)
      : data{x.data, y.data},
        count{x.count, y.count},
        stride{{x.stride[0], x.stride[1]}, {y.stride[0], y.stride[1]}},
        apart(apart),
        width(x.width),
        vectors{InVectors(x), InVectors(y) && apart % kVector<T> == 0} {}

  // Whether rows are contiguous and 16-byte aligned.
  static bool InVectors(const Matrix<T>& rows) {
    return rows.stride[1] == 1 && rows.stride[0] % kVector<T> == 0 &&
           reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0;
  }

  __device__ std::int64_t rows() const { return count[0] + count[1]; }
  __device__ const T* Side(int side) const {
    return data[side] + (side == 0 ? 0 : blockIdx.z * apart);
  }

  const T* data[2];
  std::int64_t count[2];
  std::int64_t stride[2][2];
  std::int64_t apart;
  std::int64_t width;
  bool vectors[2];
};

// A range of at most kTile rows of a pool.
struct Range {
  std::int64_t begin;
  int count;
};

__device__ __forceinline__ Range RangeOf(std::int64_t begin, std::int64_t end) {
  return {begin, static_cast<int>(min(end - begin, std::int64_t{kTile}))};
}

// Vector accesses of 16 bytes, which must be aligned.
template <typename T>
__device__ __forceinline__ void LoadVector(const T* from, T (&to)[kVector<T>]) {
  std::memcpy(to, __builtin_assume_aligned(static_cast<const void*>(from), 16), 16);
}
template <typename T>
__device__ __forceinline__ void StoreVector(const T (&from)[kVector<T>], T* to) {
  std::memcpy(__builtin_assume_aligned(static_cast<void*>(to), 16), from, 16);
}

// ---- rows in shared memory ---------------------------------------------------------------------

// Elements [k, k + kDepth) of two ranges of rows in shared memory, padded with zeros to whole
// vectors and tiles. A range that is already there is not loaded again.
template <typename T>
class RowTiles {
 public:
  using Row = T[kRowStride<T>];

  __device__ explicit RowTiles(const Pool<T>& pool)
      : pool_(pool), first_{Memory<T>().rows[0]}, second_{Memory<T>().rows[1]} {}

  // Loads both ranges. Called by all threads of the block.
  __device__ void Hold(const Range& u, const Range& v, std::int64_t k) {
    if (second_.Has(u, k)) {
      const Slot other = first_;
      first_ = second_;
      second_ = other;
    }
    same_ = u.begin == v.begin;
    const bool reads_u = !first_.Has(u, k), reads_v = !same_ && !second_.Has(v, k);
    if (!reads_u && !reads_v) return;
    __syncthreads();  // the previous tiles have been read
    if (reads_u) Read(u, k, &first_);
    if (reads_v) Read(v, k, &second_);
    __syncthreads();
  }

  __device__ const Row* u() const { return first_.rows; }
  __device__ const Row* v() const { return same_ ? first_.rows : second_.rows; }

  __device__ const Pool<T>& pool() const { return pool_; }

  // Elements of each row in shared memory, without and with padding.
  __device__ int Elements(std::int64_t k) const {
    return static_cast<int>(min(pool_.width - k, std::int64_t{kDepth<T>}));
  }
  __device__ int Depth(std::int64_t k) const {
    return (Elements(k) + kVector<T> - 1) / kVector<T> * kVector<T>;
  }

 private:
  struct Slot {
    Row* rows;
    std::int64_t begin = -1, k = -1;

    __device__ bool Has(const Range& range, std::int64_t at) const {
      return begin == range.begin && k == at;
    }
  };

  __device__ void Read(const Range& range, std::int64_t k, Slot* slot) {
    const std::int64_t end = range.begin + range.count, border = pool_.count[0];
    if (range.begin < border) ReadSide(0, range.begin, min(end, border), k, slot->rows);
    if (end > border) {
      const std::int64_t begin = max(range.begin, border);
      ReadSide(1, begin - border, end - border, k, slot->rows + (begin - range.begin));
    }
    const int elements = Elements(k), depth = Depth(k);
    if (elements < depth || range.count < kTile) {
      for (int i = threadIdx.x; i < kTile * depth; i += kThreads) {
        const int row = i / depth, element = i % depth;
        if (row >= range.count || element >= elements) slot->rows[row][element] = 0;
      }
    }
    slot->begin = range.begin;
    slot->k = k;
  }

  // Consecutive lanes read consecutive elements, also across rows that are short.
  __device__ void ReadSide(int side, std::int64_t begin, std::int64_t end, std::int64_t k,
                           Row* to) const {
    const std::int64_t across = pool_.stride[side][0], along = pool_.stride[side][1];
    const T* from = pool_.Side(side) + begin * across + k * along;
    const int rows = static_cast<int>(end - begin), elements = Elements(k);
    if (pool_.vectors[side] && elements % kVector<T> == 0) {
      const int vectors = elements / kVector<T>;
      for (int i = threadIdx.x; i < rows * vectors; i += kThreads) {
        const int row = i / vectors, element = i % vectors * kVector<T>;
        T vector[kVector<T>];
        LoadVector(from + row * across + element, vector);
        StoreVector(vector, &to[row][element]);
      }
    } else if (abs(along) <= abs(across)) {
      for (int i = threadIdx.x; i < rows * elements; i += kThreads) {
        const int row = i / elements, element = i % elements;
        to[row][element] = from[row * across + element * along];
      }
    } else {
      for (int i = threadIdx.x; i < rows * elements; i += kThreads) {
        const int row = i % rows, element = i / rows;
        to[row][element] = from[row * across + element * along];
      }
    }
  }

  const Pool<T>& pool_;
  Slot first_, second_;
  bool same_ = false;
};

// ---- pairs of rows in registers ----------------------------------------------------------------

// A thread's pairs are rows RowOf(i) and columns ColumnOf(j) of a tile, i, j < 4. Consecutive lanes
// have consecutive columns, and the two rows of slopes of a warp are in different banks.
__device__ __forceinline__ int RowOf(int i) { return static_cast<int>(threadIdx.x / 16) * 4 + i; }
__device__ __forceinline__ int ColumnOf(int j) {
  return static_cast<int>(threadIdx.x % 16) + 16 * j;
}

template <typename T>
using Pairs = T[4][4];

// The squared distances of the thread's pairs, bitwise those of the CPU's kernels with fused
// multiply-adds. kShort: width <= kDepth.
template <bool kShort, typename T>
__device__ __forceinline__ void Distances(RowTiles<T>& tiles, const Range& u, const Range& v,
                                          Pairs<T>& distances) {
  Pairs<T> stretch = {};
  if constexpr (!kShort) {
#pragma unroll
    for (int i = 0; i < 16; ++i) distances[i / 4][i % 4] = 0;
  }
  for (std::int64_t k = 0; k < tiles.pool().width; k += kDepth<T>) {
    tiles.Hold(u, v, k);
    const int depth = tiles.Depth(k);
    for (int at = 0; at < depth; at += kVector<T>) {
      T rows[4][kVector<T>];
#pragma unroll
      for (int i = 0; i < 4; ++i) LoadVector(&tiles.u()[RowOf(i)][at], rows[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        T column[kVector<T>];
        LoadVector(&tiles.v()[ColumnOf(j)][at], column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < kVector<T>; ++e) {
            const T difference = column[e] - rows[i][e];
            stretch[i][j] = fma(difference, difference, stretch[i][j]);
          }
        }
      }
    }
    if constexpr (!kShort) {
      if ((k + kDepth<T>) % kStretch == 0 || k + kDepth<T> >= tiles.pool().width) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          distances[i / 4][i % 4] += stretch[i / 4][i % 4];
          stretch[i / 4][i % 4] = 0;
        }
      }
    }
    if constexpr (kShort) break;
  }
  if constexpr (kShort) {
#pragma unroll
    for (int i = 0; i < 16; ++i) distances[i / 4][i % 4] = stretch[i / 4][i % 4];
  }
}

}  // namespace diffmic::cuda::mmd

#endif  // DIFFMIC_CUDA_MMD_MMD_TILES_CUH_
