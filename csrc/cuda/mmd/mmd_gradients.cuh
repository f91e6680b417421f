// Gradients of mmd: the sums of slope * (v - u) over the pairs of a row, accumulated tile by tile
// (mmd_tiles.cuh) and over the blocks that share a row.
#ifndef DIFFMIC_CUDA_MMD_MMD_GRADIENTS_CUH_
#define DIFFMIC_CUDA_MMD_MMD_GRADIENTS_CUH_

#include <algorithm>
#include <cstdint>

#include "cuda/mmd/mmd_tiles.cuh"

namespace diffmic::cuda::mmd {

// A compensated sum: `low` accumulates the rounding errors of `high`, for about twice the
// precision.
template <typename T>
struct alignas(2 * sizeof(T)) Sum {
  T high = 0, low = 0;

  __device__ __forceinline__ void Add(T part) {
    const T after = high + part;
    const T added = after - high;
    low += (high - (after - added)) + (part - added);
    high = after;
  }
};

// The output of the gradients; with several y (Pool), for y blockIdx.z.
template <typename T>
struct Gradients {
  T* data[2];           // compact, or NULL; that of x is NULL if there are several y
  int splits[2];        // blocks that share a row of that side
  std::int64_t border;  // the number of rows of x
  std::int64_t rows, width;
  Sum<T>* partial;  // workspace [gridDim.z, splits, rows, width]: sums over several tiles or blocks

  __device__ T* Row(std::int64_t row) const {
    if (row < border) return data[0] == nullptr ? nullptr : data[0] + row * width;
    if (data[1] == nullptr) return nullptr;
    return data[1] + (blockIdx.z * (rows - border) + row - border) * width;
  }
  __device__ Sum<T>* Partial(std::int64_t split, std::int64_t row) const {
    return partial + ((std::int64_t{blockIdx.z} * splits[1] + split) * rows + row) * width;
  }
  __device__ int SplitsOf(std::int64_t row) const { return row < border ? splits[0] : splits[1]; }

  __device__ bool Wants(const Range& range) const {
    return (range.begin < border && data[0] != nullptr) ||
           (range.begin + range.count > border && data[1] != nullptr);
  }
};

template <typename T>
std::int64_t PartialBytes(std::int64_t splits, std::int64_t column_tiles, std::int64_t rows,
                          std::int64_t width) {
  const bool kept = width <= kDepth<T>;  // in registers across tiles
  if (splits == 1 && (kept || column_tiles == 1)) return 0;
  return splits * rows * width * static_cast<std::int64_t>(sizeof(Sum<T>));
}

// The sums of slope * (v - u) over v for a tile of rows u. kShort: width <= kDepth, and the sums
// stay in registers across tiles.
template <bool kShort, typename T>
class GradientSums {
 public:
  // Accumulates one tile, whose slopes are in shared memory. Called by all threads of the block.
  __device__ void Add(RowTiles<T>& tiles, const Gradients<T>& gradients, const Range& u,
                      const Range& v, bool first, bool last) {
    const int element = static_cast<int>(threadIdx.x % 8) * kVector<T>;
    // Backwards: the last elements of the rows are still in shared memory from Distances.
    for (std::int64_t k = (tiles.pool().width - 1) / kDepth<T> * kDepth<T>; k >= 0;
         k -= kDepth<T>) {
      tiles.Hold(u, v, k);
      const int elements = tiles.Elements(k) - element;
      if (elements > 0) {
        if constexpr (!kShort) Begin(gradients, u, k + element, elements, first);
        AddTile(tiles, element, v.count);
        if constexpr (!kShort) End(gradients, u, k + element, elements, last);
      }
      if constexpr (kShort) {
        if (last && gradients.SplitsOf(u.begin) == 1) {
          WriteRows(gradients, u);
        } else if (last && elements > 0) {
          End(gradients, u, k + element, elements, last);
        }
        break;
      }
    }
  }

 private:
  static constexpr int kRows = 2;

  static __device__ __forceinline__ int TileRow(int i) {
    return static_cast<int>(threadIdx.x / 32 * 8 + threadIdx.x % 32 / 8) + 4 * i;
  }

  __device__ __forceinline__ void AddTile(const RowTiles<T>& tiles, int element, int columns) {
    constexpr int kWidth = kVector<T>;
    T own[kRows][kWidth], part[kRows][kWidth] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) LoadVector(&tiles.u()[TileRow(i)][element], own[i]);
    for (int c = 0; c < columns; c += kWidth) {
      T slopes[kRows][kWidth];
#pragma unroll
      for (int i = 0; i < kRows; ++i) LoadVector(&Memory<T>().slopes[TileRow(i)][c], slopes[i]);
#pragma unroll
      for (int s = 0; s < kWidth; ++s) {
        T other[kWidth];
        LoadVector(&tiles.v()[c + s][element], other);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            part[i][e] = fma(slopes[i][s], other[e] - own[i][e], part[i][e]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums_[i][e].Add(part[i][e]);
    }
  }

  // Writes the gradient through shared memory, so that the writes coalesce.
  __device__ __forceinline__ void WriteRows(const Gradients<T>& gradients, const Range& u) const {
    auto& results = Memory<T>().slopes;
    const int element = static_cast<int>(threadIdx.x % 8) * kVector<T>;
    __syncthreads();  // the slopes have been read
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T total[kVector<T>];
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) total[e] = sums_[i][e].high + sums_[i][e].low;
      StoreVector(total, &results[TileRow(i)][element]);
    }
    __syncthreads();
    const int width = static_cast<int>(gradients.width);
    for (int i = threadIdx.x; i < u.count * width; i += kThreads) {
      T* const result = gradients.Row(u.begin + i / width);
      if (result != nullptr) result[i % width] = results[i / width][i % width];
    }
  }

  __device__ __forceinline__ void Begin(const Gradients<T>& gradients, const Range& u,
                                        std::int64_t k, int elements, bool first) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = u.begin + TileRow(i);
      const bool known = !first && TileRow(i) < u.count && gradients.Row(row) != nullptr;
      const Sum<T>* from = known ? gradients.Partial(blockIdx.y, row) + k : nullptr;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        sums_[i][e] = known && e < elements ? from[e] : Sum<T>{};
      }
    }
  }

  __device__ __forceinline__ void End(const Gradients<T>& gradients, const Range& u, std::int64_t k,
                                      int elements, bool last) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (TileRow(i) >= u.count) continue;
      const std::int64_t row = u.begin + TileRow(i);
      T* const result = gradients.Row(row);
      if (result == nullptr) continue;
      if (last && gradients.SplitsOf(row) == 1) {
        T total[kVector<T>];
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) total[e] = sums_[i][e].high + sums_[i][e].low;
        if (elements >= kVector<T> && reinterpret_cast<std::uintptr_t>(result + k) % 16 == 0) {
          StoreVector(total, result + k);
          continue;
        }
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          if (e < elements) result[k + e] = total[e];
        }
        continue;
      }
      Sum<T>* const to = gradients.Partial(blockIdx.y, row) + k;
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        if (e < elements) to[e] = sums_[i][e];
      }
    }
  }

  Sum<T> sums_[kRows][kVector<T>];
};

// Adds the partial sums of the splits in order. Called by all threads of the grid.
template <typename T>
__device__ void AddSplits(const Gradients<T>& gradients) {
  const std::int64_t count = gradients.rows * gradients.width;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    const std::int64_t row = i / gradients.width, k = i % gradients.width;
    T* const result = gradients.Row(row);
    const int splits = gradients.SplitsOf(row);
    if (result == nullptr || splits == 1) continue;
    Sum<T> sum;
    for (int split = 0; split < splits; ++split) {
      const Sum<T> part = gradients.Partial(split, row)[k];
      sum.Add(part.high);
      sum.low += part.low;
    }
    result[k] = sum.high + sum.low;
  }
}

// The number of blocks for AddSplits.
inline unsigned AddSplitsBlocks(std::int64_t rows, std::int64_t width) {
  constexpr std::int64_t kBlocks = 1024;
  return static_cast<unsigned>(
      std::clamp((rows * width + kThreads - 1) / kThreads, std::int64_t{1}, kBlocks));
}

}  // namespace diffmic::cuda::mmd

#endif  // DIFFMIC_CUDA_MMD_MMD_GRADIENTS_CUH_
