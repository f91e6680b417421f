// GEMM of the hidden layers of `denoise` with vector instructions, for float32, bfloat16 and int8.
// Part of denoise_kernels.inc.h, compiled once per instruction set. denoise_layout.inc.h describes
// the operands; denoise_amx.inc.h is the counterpart with AMX tiles.
//
//   HiddenLayer (denoise_kernels.inc.h)  ->  Gemm  ->  MicroKernel  ->  P::MultiplyAdd
//
// A thread computes a group of chunks. A block of packed weights (32 KB of float32 with AVX-512, 16
// KB with AVX2) is read from memory once and reused from the caches for all tiles of rows. Per
// element of k the micro-kernel loads two vectors of weights and broadcasts one activation per row
// into two multiply-adds: with 6 rows (16 registers) or 12 (32), 12 or 24 multiply-adds for 8 or 14
// loads, so it is bound by arithmetic, not by the caches. Prefetching:
//
//   one tile of rows      bound by memory: a chunk is one stream, prefetched to L2 3 KB ahead
//   more tiles            the next block is prefetched to L2 while the current one is in use
//   widened weights       bound by arithmetic even for few rows: the next block, to L1
//   many rows             a group of chunks takes a block of activations from L2, not from memory
//
// Order of a sum: element by element from 0 within a block of kDepth, then block by block (int32
// sums are exact). It depends neither on the tile, hence not on the other rows, nor on the depth of
// a slice: between the slices of a block its accumulators are kept in memory.
//
// Arithmetic at F = 6144, per sweep: 4 F^2 M operations against 8 F^2 bytes of float32 weights (302
// MB), half of that in bfloat16, a quarter in int8. Two cores of 100 GFLOP/s and 12 GB/s each are
// bound by the weights up to 16 rows, by the multiply-adds beyond.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_GEMM_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_GEMM_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_layout.inc.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// ---- precisions
//
// A precision defines
//   Weight, Activation   a packed element of W, and an element of a row
//   Total, Sum           an accumulator in memory, and a vector of them in a register
//   kGroup               elements of k that one multiply-add takes, adjacent in memory
//   kParts               instructions that a group takes, one element each (else 1)
//   kPadGroups           a packed block is padded to a multiple of this many groups
//   kPanel               output channels that are interleaved
//   kTileRows            the most rows of a tile
//   kToL2                whether weights are prefetched to L2 (bound by memory) or to L1
//   kQuantised           int8: weights and activations have scales
//   kOffset              int8: added to activations for an unsigned operand
// and for this file LoadWeights, MultiplyAdd (two accumulators), and Round (kLanes activations).

struct VectorPrecision {
  using Total = float;
  using Sum = Vec;
  static constexpr bool kAmx = false;
  static constexpr bool kQuantised = false;
  static constexpr bool kToL2 = true;
  static constexpr int kParts = 1;
  static constexpr int kPadGroups = 1;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
  static constexpr int kOffset = 0;

  static Sum LoadSum(const Total* p) { return Load(p); }
  static void StoreSum(Total* p, Sum sum) { Store(p, sum); }
};
static_assert(kChunk % VectorPrecision::kPanel == 0);

// Accumulates modulo 2^32 and exactly up to kMostInt8Features.
struct VectorQuantised : VectorPrecision {
  using Weight = std::int8_t;
  using Total = std::int32_t;
  using Sum = Ints;
  static constexpr bool kQuantised = true;

  static Sum LoadSum(const Total* p) { return LoadInts(p); }
  static void StoreSum(Total* p, Sum sum) { StoreInts(p, sum); }
};

struct Float32 : VectorPrecision {
  using Weight = float;
  using Activation = float;
  static constexpr int kGroup = 1;

  static Vec LoadWeights(const Weight* w, int) { return Load(w); }
  static void MultiplyAdd(const Activation* a, Vec w0, Vec w1, Vec& sum0, Vec& sum1) {
    const Vec element = Set(*a);
    AddProduct(element, w0, sum0);
    AddProduct(element, w1, sum1);
  }
  static void Round(Vec value, Activation* out) { Store(out, value); }
};

#if defined(DIFFMIC_SIMD_AVX512_BF16)

// VDPBF16PS: sum + odd product, rounded, + even product, rounded; denormals are zero.
struct VectorBFloat16 : VectorPrecision {
  using Weight = std::uint16_t;
  using Activation = std::uint16_t;
  static constexpr int kGroup = 2;

  static Ints LoadWeights(const Weight* w, int) { return LoadInts(w); }
  static void MultiplyAdd(const Activation* a, Ints w0, Ints w1, Vec& sum0, Vec& sum1) {
    const auto pair = (__m512bh)SetFourBytes(a).v;
    sum0.v = _mm512_dpbf16_ps(sum0.v, pair, (__m512bh)w0.v);
    sum1.v = _mm512_dpbf16_ps(sum1.v, pair, (__m512bh)w1.v);
  }
  static void Round(Vec value, Activation* out) { StoreBFloat16(out, RoundToBFloat16(value)); }
};

// VPDPBUSD multiplies uint8 by int8. Activations are stored with 128 added, and the accumulators of
// a chunk start with its compensation.
struct VectorInt8 : VectorQuantised {
  using Activation = std::uint8_t;
  static constexpr int kGroup = 4;
  static constexpr int kOffset = 128;

  static Ints LoadWeights(const Weight* w, int) { return LoadInts(w); }
  static void MultiplyAdd(const Activation* a, Ints w0, Ints w1, Ints& sum0, Ints& sum1) {
    const Ints four = SetFourBytes(a);
    AddByteProducts(four, w0, sum0);
    AddByteProducts(four, w1, sum1);
  }
};

#else

// Weights are widened to float32, and activations kept in it: products are exact, sums fused.
struct VectorBFloat16 : Float32 {
  using Weight = std::uint16_t;
  static constexpr bool kToL2 = false;
  static constexpr int kGroup = 2;
  static constexpr int kParts = 2;  // loaded one at a time to fit in 16 registers

  static Vec LoadWeights(const Weight* w, int part) {
    return part == 0 ? Even(LoadInts(w)) : Odd(LoadInts(w));
  }
  static void Round(Vec value, Activation* out) { Store(out, RoundToBFloat16(value)); }
};

// Pairs of int8, widened to 16 bits.
struct VectorInt8 : VectorQuantised {
  using Activation = std::int16_t;
  static constexpr bool kToL2 = false;
  static constexpr int kGroup = 2;

  static Ints LoadWeights(const Weight* w, int) { return LoadBytePairs(w); }
  static void MultiplyAdd(const Activation* a, Ints w0, Ints w1, Ints& sum0, Ints& sum1) {
    const Ints pair = SetFourBytes(a);
    AddProducts(pair, w0, sum0);
    AddProducts(pair, w1, sum1);
  }
};

#endif

// ---- micro-kernel

constexpr int kUnroll = 4;  // groups between two prefetches

// Cache lines to prefetch during a micro-kernel, `lines` of them every kUnroll groups.
struct Ahead {
  const std::byte* next;
  int lines;
};

// Where the accumulators of a tile are read from and written to; rows are kChunk apart.
template <typename Total>
struct Accumulators {
  const Total* begin;         // null: 0
  std::int64_t begin_stride;  // 0: the same for all rows
  const Total* add;           // float: added at the end, or null
  Total* end;
};

// A tile of kRows rows x a panel over `groups` groups of k, a multiple of kLook. Not inlined, and
// without a remainder loop: otherwise GCC does not keep all accumulators in registers. All loops
// over the rows are unrolled for the same reason.
template <typename P, int kRows, int kLook>
[[gnu::noinline]] void MicroKernel(const typename P::Activation* a, const typename P::Weight* w,
                                   std::int64_t groups, Ahead ahead,
                                   const Accumulators<typename P::Total>& at) {
  constexpr int kGroup = P::kGroup;
  typename P::Sum low[kRows], high[kRows];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) low[m] = high[m] = typename P::Sum{};
  if (at.begin != nullptr) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      low[m] = P::LoadSum(at.begin + m * at.begin_stride);
      high[m] = P::LoadSum(at.begin + m * at.begin_stride + kLanes);
    }
  }
  for (std::int64_t g = 0; g < groups; g += kLook) {
    for (int line = 0; line < ahead.lines; ++line, ahead.next += 64) {
      P::kToL2 ? PrefetchToL2(ahead.next) : Prefetch(ahead.next);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLook * P::kParts; ++i) {
      const std::int64_t group = g + i / P::kParts;
      const int part = i % P::kParts;
      const auto* packed = w + group * kGroup * P::kPanel;
      const auto w_low = P::LoadWeights(packed, part);
      const auto w_high = P::LoadWeights(packed + kGroup * kLanes, part);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        P::MultiplyAdd(a + (group * kRows + m) * kGroup + part, w_low, w_high, low[m], high[m]);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    if constexpr (!P::kQuantised) {
      if (at.add != nullptr) {
        low[m] = Load(at.add + m * kChunk) + low[m];
        high[m] = Load(at.add + m * kChunk + kLanes) + high[m];
      }
    }
    P::StoreSum(at.end + m * kChunk, low[m]);
    P::StoreSum(at.end + m * kChunk + kLanes, high[m]);
  }
}

// The micro-kernels for 1 to kTileRows rows.
template <typename P, int kLook, typename Rows = std::make_integer_sequence<int, P::kTileRows>>
struct MicroKernels;
template <typename P, int kLook, int... kRow>
struct MicroKernels<P, kLook, std::integer_sequence<int, kRow...>> {
  static constexpr decltype(&MicroKernel<P, 1, kLook>) kOfRows[] = {
      MicroKernel<P, kRow + 1, kLook>...};
};

// ---- blocked loops

// Elements of k between two passes over the rows (a slice); divides kDepth. 13 to 32 rows of
// float32 are bound by memory and arithmetic alike, and shallow slices spread the prefetches. In
// the other precisions, moving the accumulators to memory and back costs more than that gains.
template <typename P>
std::int64_t SliceDepth(std::int64_t rows) {
  const bool spread = std::is_same_v<P, Float32> && kRegisters == 32;
  if (!spread || rows <= P::kTileRows || rows > 32) return kDepth;
  return rows <= 16 ? 32 : 64;
}

// Prefetch distance of a single tile of rows within its own weights. Within a page of 4 KB the
// hardware prefetcher follows; farther ahead it does not.
constexpr std::int64_t kBytesAhead = 3072;

// The packed weights of a group of chunks.
template <typename P>
struct PackedChunks {
  const std::byte* weights;
  std::int64_t chunks, features, chunk_bytes;

  std::int64_t Depth(std::int64_t k) const { return std::min(kDepth, features - k); }
  // The block of a panel that starts at k, a multiple of kDepth.
  const std::byte* Block(std::int64_t chunk, std::int64_t k, int panel) const {
    return weights + chunk * chunk_bytes + kCompensationBytes<P> +
           kPanels<P> * (k / kDepth) * PanelBytes<P>(kDepth) + panel * PanelBytes<P>(Depth(k));
  }
  // The block that is used next; after the last one, the chunk that follows the group.
  const std::byte* BlockAfter(std::int64_t chunk, std::int64_t k, int panel) const {
    if (panel + 1 < kPanels<P>) return Block(chunk, k, panel + 1);
    if (chunk + 1 < chunks) return Block(chunk + 1, k, 0);
    if (k + kDepth < features) return Block(0, k + kDepth, 0);
    return weights + chunks * chunk_bytes;
  }
};

// Layout of the accumulators in memory: [chunks, rows, kChunk].
class VectorSums {
 public:
  VectorSums(const RowTiles& tiles, std::int64_t chunks)
      : rows_(tiles.rows), size_(chunks * tiles.rows * kChunk) {}

  std::int64_t size() const { return size_; }
  std::int64_t operator()(std::int64_t chunk, const Place& place, std::int64_t channel) const {
    return (chunk * rows_ + place.row) * kChunk + channel;
  }

 private:
  std::int64_t rows_, size_;
};

// The accumulators of elements [k, k + depth), the last of their block if `ends`, of a tile at
// `to`. Those of float32 restart in every block; between its slices they are kept in `partial`.
template <typename P>
Accumulators<typename P::Total> AccumulatorsAt(std::int64_t k, bool ends,
                                               const std::int32_t* compensation,
                                               typename P::Total* to, typename P::Total* partial) {
  if constexpr (P::kQuantised) {
    if (k > 0) return {to, kChunk, nullptr, to};
    return {P::kOffset != 0 ? compensation : nullptr, 0, nullptr, to};
  } else {
    return {k % kDepth == 0 ? nullptr : partial, kChunk, ends && k >= kDepth ? to : nullptr,
            ends ? to : partial};
  }
}

// sums (VectorSums, then a workspace of [rows, kChunk]) = in . W^T for the chunks of W at
// `weights`; activations of a row take `row_bytes`.
template <typename P>
  requires(!P::kAmx)
void Gemm(const std::byte* weights, std::int64_t chunks, std::int64_t features,
          const RowTiles& tiles, const void* in, std::int64_t row_bytes, typename P::Total* sums) {
  constexpr std::int64_t kElementBytes =
      P::kPanel * static_cast<std::int64_t>(sizeof(typename P::Weight));
  const PackedChunks<P> packed{weights, chunks, features, ChunkBytes<P>(features)};
  const bool stream = P::kToL2 && tiles.count == 1;
  const std::int64_t slice = SliceDepth<P>(tiles.rows);
  typename P::Total* partial = sums + chunks * tiles.rows * kChunk;

  for (std::int64_t block = 0; block < features; block += kDepth) {
    const std::int64_t end = block + packed.Depth(block);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const auto* compensation =
          reinterpret_cast<const std::int32_t*>(weights + chunk * packed.chunk_bytes);
      for (int panel = 0; panel < kPanels<P>; ++panel) {
        for (std::int64_t k = block; k < end; k += slice) {
          const std::int64_t depth = std::min(slice, end - k);
          const bool ends = k + depth == end;
          const std::byte* w = packed.Block(chunk, block, panel) + (k - block) * kElementBytes;
          const std::byte* next = stream ? w + kBytesAhead
                                  : ends ? packed.BlockAfter(chunk, block, panel)
                                         : w + depth * kElementBytes;
          // Lines of the next weights, spread over the tiles.
          const std::int64_t groups = GroupsOf<P>(depth);
          const bool unrolled = groups % kUnroll == 0;
          const auto* micro_kernels =
              unrolled ? MicroKernels<P, kUnroll>::kOfRows : MicroKernels<P, 1>::kOfRows;
          const std::int64_t looks = unrolled ? groups / kUnroll : groups;
          const std::int64_t lines = (groups * P::kGroup * kElementBytes + 63) / 64;
          const std::int64_t each = (lines + looks * tiles.count - 1) / (looks * tiles.count);
          for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
            const std::int64_t row = tiles.Begin(tile), first_line = tile * looks * each;
            const int size = tiles.Size(tile);
            const auto* a = reinterpret_cast<const typename P::Activation*>(
                static_cast<const std::byte*>(in) + row * row_bytes);
            const std::int64_t at = row * kChunk + panel * P::kPanel;
            micro_kernels[size - 1](
                a + k * size, reinterpret_cast<const typename P::Weight*>(w), groups,
                {next + 64 * first_line, first_line < lines ? static_cast<int>(each) : 0},
                AccumulatorsAt<P>(k, ends, compensation + panel * P::kPanel,
                                  sums + chunk * tiles.rows * kChunk + at, partial + at));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_GEMM_INC_H_
