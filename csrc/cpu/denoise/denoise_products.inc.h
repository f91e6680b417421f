// The vector products of `denoise`: sums along k of activations and packed weights, which lie as
// denoise_layout.inc.h says. Part of denoise_kernels.inc.h, compiled once an instruction set.
//
// A thread computes a group of chunks. A block of weights (32 KB of float32 with AVX-512, 16 KB
// with AVX2) is read once from memory and used by all tiles of rows from the caches. For an element
// of k a tile reads two vectors of weights and one number a row, and does two multiply-adds a row:
// with 6 rows (16 registers) or 12 (32), 12 or 24 multiply-adds for 8 or 14 loads, so arithmetic
// bounds it, not the caches.
//
//   one tile of rows   bound by memory: a chunk is one stream, prefetched 3 KB ahead of itself to
//   L2 more tiles         block after block, the next one is prefetched to L2 while this one is
//   used widened weights    arithmetic bounds a few rows, too: the next block is prefetched to L1
//   many rows          a group of chunks takes a block of activations from L2 instead of memory
//
// A sum has one order: element after element within a block of kDepth, from 0, and block after
// block (int32 sums are exact). It does not depend on the tile, so not on the other rows, and not
// on the depth of a slice, between which the sums of a block are kept in memory.
//
// Arithmetic at F = 6144, a step: 4 F^2 M operations against 8 F^2 bytes of float32 weights (302
// MB), half of them as bfloat16, a quarter as bytes. With two cores of 100 GFLOP/s and 12 GB/s each
// the weights bound up to 16 rows, the multiply-adds beyond.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_PRODUCTS_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_PRODUCTS_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_layout.inc.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr int kUnroll = 4;  // groups between two prefetches

// Cache lines to fetch while a tile is computed, so many at every kUnroll groups.
struct Ahead {
  const std::byte* next;
  int lines;
};

// Where the sums of a tile begin and end. Rows are kChunk sums apart in memory.
template <typename Total>
struct Edges {
  const Total* begin;         // null: 0
  std::int64_t begin_stride;  // 0: the same for all rows
  const Total* add;           // null, or what is added at the end
  Total* end;
};

// The sums of kM rows and a panel of units. Every loop over the rows is unrolled: only then are the
// sums registers.
template <typename Product, int kM>
struct Sums {
  using Activation = typename Product::Activation;
  using Total = typename Product::Total;

  typename Product::Sum low[kM], high[kM];

  [[gnu::always_inline]] void Begin(const Edges<Total>& edges) {
    if (edges.begin == nullptr) {
#pragma GCC unroll 12
      for (int m = 0; m < kM; ++m) low[m] = high[m] = Product::ZeroSum();
    } else {
#pragma GCC unroll 12
      for (int m = 0; m < kM; ++m) {
        low[m] = Product::LoadSum(edges.begin + m * edges.begin_stride);
        high[m] = Product::LoadSum(edges.begin + m * edges.begin_stride + kLanes);
      }
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

  [[gnu::always_inline]] void End(const Edges<Total>& edges) const {
#pragma GCC unroll 12
    for (int m = 0; m < kM; ++m) {
      End(low[m], edges, m * kChunk);
      End(high[m], edges, m * kChunk + kLanes);
    }
  }

 private:
  static void End(typename Product::Sum sum, const Edges<Total>& edges, std::int64_t at) {
    if constexpr (!Product::kScaled) {
      if (edges.add != nullptr) sum = Product::LoadSum(edges.add + at) + sum;
    }
    Product::StoreSum(edges.end + at, sum);
  }
};

// A tile of kM rows, and `groups` groups, a multiple of kLook. A function of its own, without a
// loop for a rest: with either beside it, GCC would not keep all sums in registers.
template <typename Product, int kM, int kLook>
[[gnu::noinline]] void Tile(const typename Product::Activation* a,
                            const typename Product::Weight* w, std::int64_t groups, Ahead ahead,
                            const Edges<typename Product::Total>& edges) {
  constexpr int kGroup = Product::kGroup;
  Sums<Product, kM> sums;
  sums.Begin(edges);
  for (std::int64_t g = 0; g < groups; g += kLook) {
    for (int line = 0; line < ahead.lines; ++line, ahead.next += 64) {
      Product::kToL2 ? PrefetchToL2(ahead.next) : Prefetch(ahead.next);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLook; ++i) {
      sums.AddGroup(a + (g + i) * kGroup * kM, w + (g + i) * kGroup * Product::kPanel);
    }
  }
  sums.End(edges);
}

template <typename Product, int kM = Product::kMostRows>
void TileOf(int rows, const typename Product::Activation* a, const typename Product::Weight* w,
            std::int64_t groups, Ahead ahead, const Edges<typename Product::Total>& edges) {
  if constexpr (kM > 1) {
    if (rows < kM) return TileOf<Product, kM - 1>(rows, a, w, groups, ahead, edges);
  }
  if (groups % kUnroll == 0) {
    Tile<Product, kM, kUnroll>(a, w, groups, ahead, edges);
  } else {
    Tile<Product, kM, 1>(a, w, groups, ahead, edges);
  }
}

// Elements of k between two passes over the rows (a slice); divides kDepth. 13 to 32 rows of
// float32 are bound by memory and arithmetic alike, and shallow slices spread what is fetched. With
// the other precisions the sums' way to memory and back costs more than that gains.
template <typename Product>
std::int64_t SliceDepth(std::int64_t rows) {
  const bool spread = std::is_same_v<Product, Float32> && kRegisters == 32;
  if (!spread || rows <= Product::kMostRows || rows > 32) return kDepth;
  return rows <= 16 ? 32 : 64;
}

// Bytes of its own weights that a single tile of rows prefetches ahead. Within a page of 4 KB the
// processor's own prefetching follows; farther ahead it does not.
constexpr std::int64_t kBytesAhead = 3072;

// The packed weights of a group of chunks.
template <typename Product>
class ChunkGroup {
 public:
  using Weight = typename Product::Weight;

  ChunkGroup(const std::byte* weights, std::int64_t chunks, std::int64_t features)
      : weights_(weights),
        chunks_(chunks),
        features_(features),
        chunk_bytes_(ChunkBytesOf<Product>(features)) {}

  std::int64_t Depth(std::int64_t k) const { return std::min(kDepth, features_ - k); }
  const std::int32_t* Front(std::int64_t chunk) const {
    return reinterpret_cast<const std::int32_t*>(weights_ + chunk * chunk_bytes_);
  }
  // A panel's block of the elements from k on, a multiple of kDepth.
  const std::byte* Block(std::int64_t chunk, std::int64_t k, int panel) const {
    return weights_ + chunk * chunk_bytes_ + kFrontBytes<Product> +
           kPanels<Product> * (k / kDepth) * BlockBytes<Product>(kDepth) +
           panel * BlockBytes<Product>(Depth(k));
  }
  // The block that is used next; after the last one, the chunk that follows the group.
  const std::byte* BlockAfter(std::int64_t chunk, std::int64_t k, int panel) const {
    if (panel + 1 < kPanels<Product>) return Block(chunk, k, panel + 1);
    if (chunk + 1 < chunks_) return Block(chunk + 1, k, 0);
    if (k + kDepth < features_) return Block(0, k + kDepth, 0);
    return weights_ + chunks_ * chunk_bytes_;
  }

 private:
  const std::byte* weights_;
  std::int64_t chunks_, features_, chunk_bytes_;
};

// Layout of the accumulators in memory: [chunks, rows, kChunk].
class VectorSums {
 public:
  VectorSums(const RowTiles& tiles, std::int64_t chunks)
      : rows_(tiles.rows), size_(chunks * tiles.rows * kChunk) {}

  std::int64_t size() const { return size_; }
  std::int64_t operator()(std::int64_t chunk, const Place& place, std::int64_t unit) const {
    return (chunk * rows_ + place.row) * kChunk + unit;
  }

 private:
  std::int64_t rows_, size_;
};

// Sums of float32 of the elements [k, k + depth), which end a block if `ends`: between the slices
// of a block they are kept in `partial`.
template <typename Product>
Edges<float> FloatEdges(std::int64_t k, bool ends, float* sums, float* partial) {
  const bool begins = k % kDepth == 0;
  return {begins ? nullptr : partial, kChunk, ends && k >= kDepth ? sums : nullptr,
          ends ? sums : partial};
}

// sums (VectorSums) = in . W^T for the chunks of W at `weights`. `partial`: [rows, kChunk].
template <typename Product>
void GroupProduct(const std::byte* weights, std::int64_t chunks, std::int64_t features,
                  const RowTiles& tiles, const void* in, std::int64_t row_bytes,
                  typename Product::Total* sums, typename Product::Total* partial) {
  using Total = typename Product::Total;
  using Activation = typename Product::Activation;
  constexpr std::int64_t kWeightBytes =
      Product::kPanel * static_cast<std::int64_t>(sizeof(typename Product::Weight));
  const ChunkGroup<Product> group(weights, chunks, features);
  const std::int64_t rows = tiles.rows;
  const bool stream = Product::kToL2 && tiles.count == 1;
  const std::int64_t slice = SliceDepth<Product>(rows);

  // Elements [k, k + depth) of a panel for all rows, and the next ones to L2.
  const auto pass = [&](std::int64_t chunk, int panel, std::int64_t k, std::int64_t depth,
                        bool ends, const std::byte* w, const std::byte* next) {
    const std::int64_t groups = GroupsOf<Product>(depth);
    const std::int64_t looks = groups % kUnroll == 0 ? groups / kUnroll : groups;
    const std::int64_t lines = (groups * Product::kGroup * kWeightBytes + 63) / 64;
    const std::int64_t each = (lines + looks * tiles.count - 1) / (looks * tiles.count);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t row = tiles.Begin(tile);
      const int size = tiles.Size(tile);
      const auto* a =
          reinterpret_cast<const Activation*>(static_cast<const std::byte*>(in) + row * row_bytes);
      const std::int64_t offset = row * kChunk + panel * Product::kPanel;
      Total* to = sums + chunk * rows * kChunk + offset;
      Edges<Total> edges{};
      if constexpr (Product::kScaled) {
        edges = {k > 0 ? to : nullptr, kChunk, nullptr, to};
        if (k == 0 && Product::kOffset != 0) {
          edges.begin = group.Front(chunk) + panel * Product::kPanel;
          edges.begin_stride = 0;
        }
      } else {
        edges = FloatEdges<Product>(k, ends, to, partial + offset);
      }
      const std::int64_t first_line = tile * looks * each;
      const Ahead ahead{next + 64 * first_line, first_line < lines ? static_cast<int>(each) : 0};
      TileOf<Product>(size, a + k * size, reinterpret_cast<const typename Product::Weight*>(w),
                      groups, ahead, edges);
    }
  };
  for (std::int64_t block = 0; block < features; block += kDepth) {
    const std::int64_t depth = group.Depth(block);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int panel = 0; panel < kPanels<Product>; ++panel) {
        const std::byte* w = group.Block(chunk, block, panel);
        for (std::int64_t k = 0; k < depth; k += slice) {
          const std::int64_t taken = std::min(slice, depth - k);
          const std::byte* here = w + k * kWeightBytes;
          const bool ends = k + taken == depth;
          const std::byte* next = stream ? here + kBytesAhead
                                  : ends ? group.BlockAfter(chunk, block, panel)
                                         : here + taken * kWeightBytes;
          pass(chunk, panel, block + k, taken, ends, here, next);
        }
      }
    }
  }
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_PRODUCTS_INC_H_
