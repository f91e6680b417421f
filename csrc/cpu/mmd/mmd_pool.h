// What the calls of mmd.h share: the rows of both sets, cut into blocks, and the distances of a
// tile.
#ifndef DIFFMIC_CPU_MMD_MMD_POOL_H_
#define DIFFMIC_CPU_MMD_MMD_POOL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/mmd/mmd_tiles.h"
#include "include/mmd_call.h"

namespace diffmic::cpu::mmd {

using namespace diffmic::mmd;

inline constexpr IsaEntry<Kernels> kTables[] = {
#if defined(__x86_64__)
    {Isa::kAvx512, &avx512::kKernels},
    {Isa::kAvx2, &avx2::kKernels},
#endif
    {Isa::kPortable, &portable::kKernels},
};

// A block of consecutive rows of one side: 0 is x, 1 is y.
struct Block {
  int side;
  std::int64_t begin, end;

  std::int64_t count() const { return end - begin; }
};

// Both sets of rows, copied only if the elements of a row are not contiguous.
template <typename T>
struct Pool {
  Pool(const Matrix<T>& x, const Matrix<T>& y, Isa isa)
      : kernels(KernelsOf(*FindKernels(kTables, isa))), width(x.width), count{x.count, y.count} {
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
  static const TileKernels<T>& KernelsOf(const Kernels& table) {
    if constexpr (std::is_same_v<T, float>) return table.of_float;
    if constexpr (std::is_same_v<T, double>) return table.of_double;
  }

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

// The blocks of both sides, or of one: kTileRows rows, or half of that if there would be too few
// blocks for the threads. Depends on the sizes alone, never on the number of threads.
template <typename T>
std::vector<Block> BlocksOf(const Pool<T>& pool, bool x = true, bool y = true) {
  constexpr std::int64_t kEnough = 16;
  constexpr double kSmall = 2e6;  // differences per tile; smaller tiles are not halved
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

// A thread's workspace for distances.
template <typename T>
class Tile {
 public:
  explicit Tile(const Pool<T>& pool)
      : pool_(pool),
        panels_(std::make_unique_for_overwrite<T[]>(
            static_cast<std::size_t>(kTileColumns * std::min(pool.width, kChunk)))),
        values_(std::make_unique_for_overwrite<T[]>(kTileRows * kTileColumns)) {}

  // Squared distances between the rows of two blocks; mmd_tiles.h defines `upper`.
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
