// What the calls of mmd.h share: both row sets as one padded array.
#ifndef DIFFMIC_CPU_MMD_POOL_H_
#define DIFFMIC_CPU_MMD_POOL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/mmd.h"
#include "cpu/mmd_tiles.h"
#include "cpu/parallel.h"

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

// The rows of x, then those of y, padded with zeros.
template <typename T>
struct Pool {
  Pool(const Matrix<T>& x, const Matrix<T>& y, Isa isa)
      : kernels(KernelsOf<T>(isa)),
        width(x.width),
        stride((x.width + kernels.padding - 1) / kernels.padding * kernels.padding),
        count{x.count, y.count},
        rows(std::make_unique_for_overwrite<T[]>(
            static_cast<std::size_t>((x.count + y.count) * stride))) {
    Copy(x, rows.get());
    Copy(y, rows.get() + x.count * stride);
  }

  // Row `index` of side 0 (x) or 1 (y).
  const T* row(int side, std::int64_t index) const {
    return rows.get() + (side * count[0] + index) * stride;
  }

  const TileKernels<T>& kernels;
  std::int64_t width, stride;
  std::int64_t count[2];
  std::unique_ptr<T[]> rows;

 private:
  void Copy(const Matrix<T>& from, T* to) const {
    for (std::int64_t i = 0; i < from.count; ++i) {
      const T* line = from.data + i * from.stride[0];
      if (from.stride[1] == 1) {
        std::copy_n(line, width, to);
      } else {
        for (std::int64_t k = 0; k < width; ++k) to[k] = line[k * from.stride[1]];
      }
      std::fill(to + width, to + stride, T{0});
      to += stride;
    }
  }
};

// One thread's memory for distances.
template <typename T>
class Tile {
 public:
  explicit Tile(const Pool<T>& pool)
      : pool_(pool),
        panels_(std::make_unique_for_overwrite<T[]>(
            static_cast<std::size_t>(kTileColumns * std::min(pool.width, kChunk)))),
        values_(std::make_unique_for_overwrite<T[]>(kTileRows * kTileColumns)) {}

  // Squared distances of `rows` rows from u to `columns` rows from v.
  T* Distances(const T* u, std::int64_t rows, const T* v, std::int64_t columns) {
    for (std::int64_t k = 0; k < pool_.width; k += kChunk) {
      const std::int64_t depth = std::min(kChunk, pool_.width - k);
      pool_.kernels.pack(v + k, pool_.stride, columns, depth, panels_.get());
      pool_.kernels.distances(u + k, pool_.stride, rows, panels_.get(), columns, depth, k == 0,
                              values_.get());
    }
    return values_.get();
  }

  T* values() const { return values_.get(); }

 private:
  const Pool<T>& pool_;
  std::unique_ptr<T[]> panels_, values_;
};

}  // namespace diffmic::cpu::mmd

#endif  // DIFFMIC_CPU_MMD_POOL_H_
