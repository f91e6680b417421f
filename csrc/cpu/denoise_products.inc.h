// The products of `denoise`: sums along k of activations and packed weights, which lie as
// denoise_layout.inc.h says. Part of denoise_kernels.inc.h, compiled once an instruction set.
//
// A thread takes a chunk and goes along it: a block of a panel (16 KB of float32 with AVX2) comes
// from memory once, prefetched while the one before it is in use, and stays in L1 for all tiles of
// rows. For an element of k a tile reads two vectors of weights and one number a row, and does two
// multiply-adds a row: with 6 rows (16 registers) or 12 (32), 12 or 24 multiply-adds against 8 or
// 14 loads, so the sums' arithmetic bounds it, not the caches. A few rows are bound by memory
// alone, and read several blocks at the same time (StreamBlocks).
//
// A sum has one order: element after element within a block, from 0, and block after block. It
// does not depend on the tile, so not on the rows beside it.
//
// Arithmetic at F = 6144, a step: 4 F^2 M operations against 8 F^2 bytes of float32 weights (302
// MB), half of them as bfloat16, a quarter as bytes. With two cores of 100 GFLOP/s and 12 GB/s each
// the weights bound up to 16 rows, the multiply-adds beyond.
#ifndef DIFFMIC_CPU_DENOISE_PRODUCTS_INC_H_
#define DIFFMIC_CPU_DENOISE_PRODUCTS_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/denoise_kernels.h"
#include "cpu/denoise_layout.inc.h"
#include "cpu/simd.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr int kUnroll = 4;  // groups between two looks at what to prefetch

// Where the sums of kLanes units begin; `front` lies in front of their block.
template <typename Product>
typename Product::Sum Begin(const std::int32_t* front) {
  if constexpr (Product::kScaled) {
    return Product::Begin(front);
  } else {
    return Zero();
  }
}

// What to fetch while a tile is computed: the next block, a part of it with each tile.
struct Ahead {
  const std::byte* next;
  int lines;  // a look
};

// The sums of kM rows and a panel of units. Every loop over the rows is unrolled: only then are the
// sums registers.
template <typename Product, int kM>
struct Sums {
  using Activation = typename Product::Activation;

  typename Product::Sum low[kM], high[kM];

  [[gnu::always_inline]] void Begin(const std::byte* block) {
    const auto* front = reinterpret_cast<const std::int32_t*>(block);
#pragma GCC unroll 12
    for (int m = 0; m < kM; ++m) {
      low[m] = DIFFMIC_SIMD::Begin<Product>(front);
      high[m] = DIFFMIC_SIMD::Begin<Product>(front + kLanes);
    }
  }

  template <int kPart>
  [[gnu::always_inline]] void Add(const Activation* a, const typename Product::Weight* w) {
    const auto w_low = Product::template LoadWeights<kPart>(w);
    const auto w_high = Product::template LoadWeights<kPart>(w + Product::kGroup * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kM; ++m) {
      Product::template MultiplyAdd<kPart>(a + m * Product::kGroup, w_low, w_high, low[m], high[m]);
    }
  }

  // kGroup elements of k of every row.
  [[gnu::always_inline]] void AddGroup(const Activation* a, const typename Product::Weight* w) {
    Add<0>(a, w);
    if constexpr (Product::kParts == 2) Add<1>(a, w);
  }

  [[gnu::always_inline]] void End(bool first, float* sums) const {
#pragma GCC unroll 12
    for (int m = 0; m < kM; ++m) {
      End(low[m], first, sums + m * kChunk);
      End(high[m], first, sums + m * kChunk + kLanes);
    }
  }

 private:
  static void End(typename Product::Sum sum, bool first, float* to) {
    const Vec block_sum = Product::Finish(sum);
    Store(to, first ? block_sum : Load(to) + block_sum);
  }
};

// sums[m * kChunk + n] = or += a_m . w_n, for a tile of kM rows and `groups` groups, a multiple of
// kUnroll, of kStreams blocks of panels that follow each other. A function of its own, without a
// loop for a rest: with either beside it, GCC would not keep all sums in registers.
template <typename Product, int kM, int kStreams, int kUnroll>
[[gnu::noinline]] void Tile(const typename Product::Activation* a, const std::byte* block,
                            std::int64_t groups, Ahead ahead, bool first, float* sums) {
  constexpr int kGroup = Product::kGroup;
  constexpr std::int64_t kBytes = BlockBytes<Product>(kDepth);
  const std::byte* w = block + FrontBytes<Product>();
  Sums<Product, kM> streams[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) streams[s].Begin(block + s * kBytes);
  for (std::int64_t g = 0; g < groups; g += kUnroll) {
    for (int line = 0; line < ahead.lines; ++line, ahead.next += 64) Prefetch(ahead.next);
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) {
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const auto* weights = reinterpret_cast<const typename Product::Weight*>(w + s * kBytes);
        streams[s].AddGroup(a + (s / kPanels * kDepth + (g + i) * kGroup) * kM,
                            weights + (g + i) * kGroup * kPanel);
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    streams[s].End(first && s < kPanels, sums + s % kPanels * kPanel);
  }
}

template <typename Product, int kM = kTileRows>
void TileOf(int rows, const typename Product::Activation* a, const std::byte* block,
            std::int64_t groups, Ahead ahead, bool first, float* sums) {
  if constexpr (kM > 1) {
    if (rows < kM) return TileOf<Product, kM - 1>(rows, a, block, groups, ahead, first, sums);
  }
  if (groups % kUnroll == 0) {
    Tile<Product, kM, 1, kUnroll>(a, block, groups, ahead, first, sums);
  } else {
    Tile<Product, kM, 1, 1>(a, block, groups, ahead, first, sums);
  }
}

// Blocks that a tile of few rows reads at the same time: memory gives a fifth more to four streams
// than to one (two cores of a Zen 3 processor), as many as there are registers for. Their reading
// is even, so the processor's own prefetching does better than ours. Where weights are widened
// first, arithmetic bounds even a few rows, and they stay with one stream.
constexpr int StreamsOf(int rows) { return kTileRows >= 4 * rows ? 4 : 2; }

// As many whole blocks of a chunk as go into streams, for all rows, which are one tile. Returns
// them.
template <typename Product, int kM = Product::kStreamRows>
std::int64_t StreamBlocks(std::int64_t rows, const typename Product::Activation* a,
                          const std::byte* chunk, std::int64_t features, float* sums) {
  if constexpr (kM > 1) {
    if (rows < kM) return StreamBlocks<Product, kM - 1>(rows, a, chunk, features, sums);
  }
  constexpr int kStreams = StreamsOf(kM);
  static_assert(kStreams % kPanels == 0 || kPanels % kStreams == 0);
  constexpr std::int64_t kGroups = kDepth / Product::kGroup;
  const std::int64_t blocks = features / kDepth * kPanels / kStreams * kStreams;
  for (std::int64_t i = 0; i < blocks; i += kStreams) {
    Tile<Product, kM, kStreams, 1>(a + i / kPanels * kDepth * kM,
                                   chunk + i * BlockBytes<Product>(kDepth), kGroups, {nullptr, 0},
                                   i < kPanels, sums + i % kPanels * kPanel);
  }
  return blocks;
}

// sums [rows, kChunk] = in . W^T for the chunk of W at `chunk`.
template <typename Product>
void ChunkProduct(const std::byte* chunk, std::int64_t features, std::int64_t rows, const void* in,
                  std::int64_t row_bytes, float* sums) {
  using Activation = typename Product::Activation;
  const Tiles tiles(rows);
  std::int64_t block = 0;
  if constexpr (Product::kStreamRows > 0) {
    if (rows <= Product::kStreamRows) {
      block =
          StreamBlocks<Product>(rows, static_cast<const Activation*>(in), chunk, features, sums);
      chunk += block * BlockBytes<Product>(kDepth);
    }
  }
  for (; block / kPanels * kDepth < features; ++block) {
    const std::int64_t k = block / kPanels * kDepth;
    const int panel = static_cast<int>(block % kPanels) * kPanel;
    const std::int64_t depth = std::min(kDepth, features - k);
    const std::byte* next = chunk + BlockBytes<Product>(depth);
    const bool last = k + depth == features && panel + kPanel == kChunk;
    // Lines a look, so that the tiles together fetch a block.
    const std::int64_t groups = (depth + Product::kGroup - 1) / Product::kGroup;
    const std::int64_t looks = groups % kUnroll == 0 ? groups / kUnroll : groups;
    const std::int64_t lines = BlockBytes<Product>(depth) / 64;
    const std::int64_t each = (lines + looks * tiles.count - 1) / (looks * tiles.count);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t row = tiles.Begin(tile);
      const int size = tiles.Size(tile);
      const auto* a =
          reinterpret_cast<const Activation*>(static_cast<const std::byte*>(in) + row * row_bytes);
      const std::int64_t ahead = tile * looks * each;
      TileOf<Product>(size, a + k * size, chunk, groups,
                      {next + 64 * ahead, last || ahead >= lines ? 0 : static_cast<int>(each)},
                      k == 0, sums + row * kChunk + panel);
    }
    chunk = next;
  }
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_PRODUCTS_INC_H_
