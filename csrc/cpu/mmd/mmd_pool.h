// What the calls of mmd.h share: both row sets as one padded array.
#ifndef DIFFMIC_CPU_MMD_MMD_POOL_H_
#define DIFFMIC_CPU_MMD_MMD_POOL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/common/parallel.h"
#include "cpu/mmd/mmd.h"
#include "cpu/mmd/mmd_tiles.h"

namespace diffmic::cpu::mmd {

template <typename T>
const TileKernels<T>& KernelsOf(Isa isa) {
  constexpr bool kSingle = std::is_same_v<T, float>;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 || (isa == Isa::kAuto && Runs(Isa::kAvx512))) {
    if constexpr (kSingle) return avx512::kFloat;
    if constexpr (!kSingle) return avx512::kDouble;
  }
  if (isa == Isa::kAvx2 || (isa == Isa::kAuto && Runs(Isa::kAvx2))) {
    if constexpr (kSingle) return avx2::kFloat;
    if constexpr (!kSingle) return avx2::kDouble;
  }
#endif
  static_cast<void>(isa);
  if constexpr (kSingle) return portable::kFloat;
  if constexpr (!kSingle) return portable::kDouble;
}

// A block of consecutive rows of one side: 0 is x, 1 is y.
struct Block {
  int side;
  std::int64_t begin, end;

  std::int64_t count() const { return end - begin; }
};

// Both row sets, copied only where a row's elements are not next to each other.
template <typename T>
struct Pool {
  Pool(const Matrix<T>& x, const Matrix<T>& y, Isa isa)
      : kernels(KernelsOf<T>(isa)), width(x.width), count{x.count, y.count} {
    Take(x, 0);
    Take(y, 1);
  }

  RowBlock<T> rows(const Block& block) const {
    return {data[block.side] + block.begin * stride[block.side], stride[block.side], block.count()};
  }

  const TileKernels<T>& kernels;
  std::int64_t width;
  std::int64_t count[2];

 private:
  void Take(const Matrix<T>& from, int side) {
    data[side] = from.data;
    stride[side] = from.stride[0];
    if (from.stride[1] == 1 || width == 1) return;
    copies[side] =
        std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(from.count * width));
    T* to = copies[side].get();
    data[side] = to;
    stride[side] = width;
    for (std::int64_t i = 0; i < from.count; ++i) {
      const T* line = from.data + i * from.stride[0];
      for (std::int64_t k = 0; k < width; ++k) *to++ = line[k * from.stride[1]];
    }
  }

  const T* data[2];
  std::int64_t stride[2];
  std::unique_ptr<T[]> copies[2];
};

// The blocks of both sides, or of those wanted: of a tile's rows, or fewer where there would be too
// few blocks to share out. By the sizes alone, never by the number of threads.
template <typename T>
std::vector<Block> BlocksOf(const Pool<T>& pool, bool x = true, bool y = true) {
  constexpr std::int64_t kEnough = 16;
  constexpr double kSmall = 2e6;  // differences in a tile, below which it is not divided
  const bool few = (pool.count[0] + pool.count[1]) / kTileRows < kEnough;
  const bool large = static_cast<double>(kTileRows * kTileRows * pool.width) > kSmall;
  const std::int64_t step = few && large ? kTileRows / 2 : kTileRows;
  std::vector<Block> blocks;
  for (int side = 0; side < 2; ++side) {
    if (!(side == 0 ? x : y)) continue;
    for (std::int64_t i = 0; i < pool.count[side]; i += step) {
      blocks.push_back({side, i, std::min(i + step, pool.count[side])});
    }
  }
  return blocks;
}

// One thread's memory for distances.
template <typename T>
class Tile {
 public:
  explicit Tile(const Pool<T>& pool)
      : pool_(pool),
        panels_(std::make_unique_for_overwrite<T[]>(
            static_cast<std::size_t>(kTileColumns * std::min(pool.width, kChunk)))),
        values_(std::make_unique_for_overwrite<T[]>(kTileRows * kTileColumns)) {}

  // Squared distances between the rows of two blocks; of `upper`, see mmd_tiles.h.
  T* Distances(const Block& rows, const Block& columns, bool upper = false) {
    RowBlock<T> u = pool_.rows(rows), v = pool_.rows(columns);
    for (std::int64_t k = 0; k < pool_.width; k += kChunk) {
      const std::int64_t depth = std::min(kChunk, pool_.width - k);
      pool_.kernels.pack(v, depth, panels_.get());
      pool_.kernels.distances(u, panels_.get(), v.count, depth, k == 0, upper, values_.get());
      u.data += depth;
      v.data += depth;
    }
    return values_.get();
  }

 private:
  const Pool<T>& pool_;
  std::unique_ptr<T[]> panels_, values_;
};

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_MMD_POOL_H_
