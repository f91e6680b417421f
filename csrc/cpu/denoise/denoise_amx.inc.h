// GEMM of the hidden layers of `denoise` with AMX tiles, for bfloat16 and int8. Part of
// denoise_kernels.inc.h, compiled for the hardware (denoise_amx.cpp) and for its emulation
// (denoise_amx_emulated.cpp).
//
//   HiddenLayer (denoise_kernels.inc.h)  ->  Gemm  ->  FewRows or ManyRows  ->  AddSlices  ->
//   P::Dot
//
// One instruction multiplies a tile of up to 16 rows x 64 bytes of k by a tile of 64 bytes of k x
// 16 output channels. Weights are packed as for AVX-512 in bfloat16: 16 groups are two tiles of B
// side by side, with a row stride of 128 bytes; a chunk is zero-padded to whole slices of 64 bytes
// of k. Activations:
//
//   block of 512 bytes of k | tile of rows | slice of 64 bytes of k | row | 64 bytes
//
// so that a block is contiguous for any number of rows. All tiles have the same number of rows (17
// rows are two tiles of 9), and one tile configuration serves the call.
//
//   FewRows    up to 3 tiles of rows: accumulators stay in tiles for all of k; weights are streamed
//              and prefetched to L2 6 KB ahead.
//   ManyRows   blocked over k: 16 KB of weights stay in L1 for all rows, and the next block is
//              prefetched to L2. From 65 rows on, a group of chunks shares a pass over the
//              activations.
//
// Order of a sum: k ascends in slices of 64 bytes, within a slice in the order of the instruction
// (amx_emulated_tiles.h). Blocks continue from the accumulators themselves, so a sum depends
// neither on the other rows nor on blocks, groups or threads.
//
// Arithmetic at F = 6144, per sweep: 151 MB of bfloat16 weights (76 MB of int8) against 4 F^2 M
// operations at 3 TFLOP/s (int8: 6 TOP/s) per core on non-repeating operands: memory-bound up to
// about 64 rows.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_AMX_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_AMX_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/common/simd.h"
#include "cpu/denoise/amx_tiles.h"
#include "cpu/denoise/denoise_gemm.inc.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_layout.inc.h"
#if defined(DIFFMIC_SIMD_AMX_EMULATED)
#include "cpu/denoise/amx_emulated_tiles.h"
#endif

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

#if defined(DIFFMIC_SIMD_AMX_EMULATED)
using TileRegisters = EmulatedTiles;
#else
using TileRegisters = HardwareTiles;
#endif

constexpr std::int64_t kSliceBytes = 64;               // of k, for one instruction
constexpr std::int64_t kBlockBytes = 8 * kSliceBytes;  // of k, whose weights stay in L1
constexpr std::int64_t kTileBytes = 1024;
constexpr std::int64_t kSliceWeights = 2 * kTileBytes;  // bytes of a slice of a chunk
constexpr std::int64_t kChunkSums = 2 * kTileBytes;     // bytes of a tile's sums of a chunk
constexpr std::int64_t kTileBytesAhead = 6144;
static_assert(kChunk == 32);

struct AmxBFloat16 : VectorPrecision {
  using Weight = std::uint16_t;
  using Activation = std::uint16_t;
  static constexpr bool kAmx = true;
  static constexpr int kGroup = 2;
  static constexpr int kPadGroups = 16;
  static constexpr int kPanel = kChunk;
  static constexpr int kTileRows = 16;

  static void Round(Vec value, Activation* out) { StoreBFloat16(out, RoundToBFloat16(value)); }
  template <int kC, int kA, int kB>
  [[gnu::always_inline]] static void Dot(TileRegisters& tiles) {
    tiles.template DotBFloat16<kC, kA, kB>();
  }
};

struct AmxInt8 : VectorQuantised {
  using Activation = std::int8_t;
  static constexpr bool kAmx = true;
  static constexpr int kGroup = 4;
  static constexpr int kPadGroups = 16;
  static constexpr int kPanel = kChunk;
  static constexpr int kTileRows = 16;

  template <int kC, int kA, int kB>
  [[gnu::always_inline]] static void Dot(TileRegisters& tiles) {
    tiles.template DotInt8<kC, kA, kB>();
  }
};

template <typename P>
constexpr std::int64_t RowBytes(std::int64_t features) {
  const std::int64_t bytes = features * static_cast<std::int64_t>(sizeof(typename P::Activation));
  return (bytes + kSliceBytes - 1) / kSliceBytes * kSliceBytes;
}

// Writes a row of the AMX GEMM's activations.
template <typename P>
class AmxRow {
 public:
  using Activation = typename P::Activation;

  AmxRow(const DenoiserView& model, const RowTiles& tiles, const Place& place, void* activations)
      : features_(model.features),
        row_bytes_(RowBytes<P>(model.features)),
        tiles_(tiles.count),
        rows_(tiles.size),
        tile_(place.tile),
        to_(static_cast<std::byte*>(activations) + place.within * kSliceBytes) {}

  // Elements [k, k + count) of the row, k a multiple of kLanes. After the last one the rest of its
  // slice becomes 0: its weights are 0, but stale memory may hold NaN.
  void Set(std::int64_t k, const Activation* values, int count) const {
    constexpr std::int64_t kSize = sizeof(Activation);
    const std::int64_t byte = k * kSize;
    const std::int64_t block = byte / kBlockBytes * kBlockBytes;
    const std::int64_t bytes = std::min(kBlockBytes, row_bytes_ - block);
    const std::int64_t slice = (byte - block) / kSliceBytes * kSliceBytes;
    std::byte* to = to_ + rows_ * (tiles_ * block + tile_ * bytes + slice) + byte % kSliceBytes;
    std::memcpy(to, values, static_cast<std::size_t>(count * kSize));
    if (k + count < features_) return;
    const std::int64_t rest = row_bytes_ - (k + count) * kSize;
    std::memset(to + count * kSize, 0, static_cast<std::size_t>(rest));
  }

 private:
  std::int64_t features_, row_bytes_, tiles_, rows_, tile_;
  std::byte* to_;
};

// Layout of the accumulators in memory: tile of rows | chunk | half of its channels | row |
// 16 channels.
class AmxSums {
 public:
  AmxSums(const RowTiles& tiles, std::int64_t chunks)
      : stride_(chunks * kChunkSums / 4), size_(tiles.count * stride_) {}

  std::int64_t size() const { return size_; }
  std::int64_t operator()(std::int64_t chunk, const Place& place, std::int64_t channel) const {
    return place.tile * stride_ + chunk * (kChunkSums / 4) + channel / 16 * (kTileBytes / 4) +
           place.within * 16 + channel % 16;
  }

 private:
  std::int64_t stride_, size_;
};

// Accumulators: tiles 0 to 5 at most. A: 6, B: 7, and up to two tiles of rows, also A: 2, B: 5.
inline TileConfig ConfigOf(std::int64_t rows, bool three) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = static_cast<std::uint8_t>(t == 7 || (t == 5 && !three) ? 16 : rows);
  }
  return config;
}

// Cache lines to prefetch to L2, `lines` of them per slice.
struct LinesAhead {
  const std::byte* next;
  int lines;
};

// Multiplies `slices` slices of kTiles (1 to 3) tiles of rows by a chunk, into the accumulators in
// tiles 0 to 5. 3 x 2 accumulators leave two tiles for operands, which are reloaded each time.
template <typename P, int kTiles>
[[gnu::always_inline]] inline void AddSlices(TileRegisters& tiles, const std::byte* a,
                                             std::int64_t tile_bytes, std::int64_t slice_bytes,
                                             const std::byte* w, std::int64_t slices,
                                             LinesAhead& ahead) {
  const std::byte* a1 = a + tile_bytes;
  const std::byte* a2 = a1 + tile_bytes;
  for (std::int64_t s = 0; s < slices; ++s) {
    if constexpr (kTiles == 3) {
      tiles.template Load<6>(a, kSliceBytes);
      tiles.template Load<7>(w, 2 * kSliceBytes);
      P::template Dot<0, 6, 7>(tiles);
      tiles.template Load<7>(w + kSliceBytes, 2 * kSliceBytes);
      P::template Dot<3, 6, 7>(tiles);
      tiles.template Load<6>(a1, kSliceBytes);
      P::template Dot<4, 6, 7>(tiles);
      tiles.template Load<7>(w, 2 * kSliceBytes);
      P::template Dot<1, 6, 7>(tiles);
      tiles.template Load<6>(a2, kSliceBytes);
      P::template Dot<2, 6, 7>(tiles);
      tiles.template Load<7>(w + kSliceBytes, 2 * kSliceBytes);
      P::template Dot<5, 6, 7>(tiles);
    } else {
      tiles.template Load<7>(w, 2 * kSliceBytes);
      tiles.template Load<6>(a, kSliceBytes);
      P::template Dot<0, 6, 7>(tiles);
      tiles.template Load<5>(w + kSliceBytes, 2 * kSliceBytes);
      P::template Dot<3, 6, 5>(tiles);
      if constexpr (kTiles == 2) {
        tiles.template Load<2>(a1, kSliceBytes);
        P::template Dot<1, 2, 7>(tiles);
        P::template Dot<4, 2, 5>(tiles);
      }
    }
    for (int i = 0; i < ahead.lines; ++i, ahead.next += 64) PrefetchToL2(ahead.next);
    a += slice_bytes, a1 += slice_bytes, a2 += slice_bytes;
    w += kSliceWeights;
  }
}

template <int kTiles>
[[gnu::always_inline]] inline void ZeroSums(TileRegisters& tiles) {
  tiles.Zero<0>(), tiles.Zero<3>();
  if constexpr (kTiles > 1) tiles.Zero<1>(), tiles.Zero<4>();
  if constexpr (kTiles > 2) tiles.Zero<2>(), tiles.Zero<5>();
}
template <int kTiles>
[[gnu::always_inline]] inline void LoadSums(TileRegisters& tiles, const std::byte* c,
                                            std::int64_t tile) {
  tiles.Load<0>(c, 64), tiles.Load<3>(c + kTileBytes, 64);
  if constexpr (kTiles > 1) tiles.Load<1>(c + tile, 64), tiles.Load<4>(c + tile + kTileBytes, 64);
}
template <int kTiles>
[[gnu::always_inline]] inline void StoreSums(TileRegisters& tiles, std::byte* c,
                                             std::int64_t tile) {
  tiles.Store<0>(c, 64), tiles.Store<3>(c + kTileBytes, 64);
  if constexpr (kTiles > 1) tiles.Store<1>(c + tile, 64), tiles.Store<4>(c + tile + kTileBytes, 64);
  if constexpr (kTiles > 2) {
    tiles.Store<2>(c + 2 * tile, 64), tiles.Store<5>(c + 2 * tile + kTileBytes, 64);
  }
}

// sums (AmxSums) = in . W^T for the chunks of W at `weights`, up to three tiles of rows.
//
// A tile store that comes half a microsecond or more after the one before it costs some 250 ns. One
// to a line that stays in L1, every block, avoids that and costs nothing (measured; not
// documented).
template <typename P, int kTiles>
void FewRows(const std::byte* weights, std::int64_t chunks, std::int64_t features,
             const RowTiles& rows, const void* in, typename P::Total* sums) {
  alignas(64) std::byte unused[kTileBytes];
  const std::int64_t bytes = RowBytes<P>(features), slice_bytes = rows.size * kSliceBytes;
  TileRegisters tiles(ConfigOf(rows.size, kTiles == 3));
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto* a = static_cast<const std::byte*>(in);
    const std::byte* w = weights + chunk * bytes * kChunk;
    LinesAhead ahead{w + kTileBytesAhead, kSliceWeights / 64};
    ZeroSums<kTiles>(tiles);
    for (std::int64_t k = 0; k < bytes; k += kBlockBytes) {
      const std::int64_t slices = std::min(kBlockBytes, bytes - k) / kSliceBytes;
      AddSlices<P, kTiles>(tiles, a, slices * slice_bytes, slice_bytes, w, slices, ahead);
      a += kTiles * slices * slice_bytes;
      w += slices * kSliceWeights;
      if (k + kBlockBytes < bytes) tiles.template Store<7>(unused, 64);
    }
    StoreSums<kTiles>(tiles, reinterpret_cast<std::byte*>(sums) + chunk * kChunkSums,
                      chunks * kChunkSums);
  }
}

// The same for any number of rows, block after block of k.
template <typename P>
void ManyRows(const std::byte* weights, std::int64_t chunks, std::int64_t features,
              const RowTiles& rows, const void* in, typename P::Total* sums) {
  const std::int64_t bytes = RowBytes<P>(features), slice_bytes = rows.size * kSliceBytes;
  const std::int64_t stride = chunks * kChunkSums;
  TileRegisters tiles(ConfigOf(rows.size, false));
  const auto block = [&](std::int64_t chunk, std::int64_t k) {
    return weights + (chunk * bytes + k) * kChunk;
  };
  for (std::int64_t k = 0; k < bytes; k += kBlockBytes) {
    const std::int64_t slices = std::min(kBlockBytes, bytes - k) / kSliceBytes;
    const std::int64_t looks = slices * ((rows.count + 1) / 2), lines = slices * kSliceWeights / 64;
    const int each = static_cast<int>((lines + looks - 1) / looks);
    const std::byte* block_a = static_cast<const std::byte*>(in) + k * rows.count * rows.size;
    for (std::int64_t c = 0; c < chunks; ++c) {
      const std::byte* w = block(c, k);
      // The block that is used next; after the last one, the chunk that follows the group.
      LinesAhead ahead{c + 1 < chunks            ? block(c + 1, k)
                       : k + kBlockBytes < bytes ? block(0, k + kBlockBytes)
                                                 : block(chunks, 0),
                       0};
      const std::byte* end = ahead.next + lines * 64;
      for (std::int64_t tile = 0; tile < rows.count; tile += 2) {
        const std::byte* a = block_a + tile * slices * slice_bytes;
        std::byte* to = reinterpret_cast<std::byte*>(sums) + tile * stride + c * kChunkSums;
        ahead.lines = ahead.next < end ? each : 0;
        if (tile + 1 < rows.count) {
          k == 0 ? ZeroSums<2>(tiles) : LoadSums<2>(tiles, to, stride);
          AddSlices<P, 2>(tiles, a, slices * slice_bytes, slice_bytes, w, slices, ahead);
          StoreSums<2>(tiles, to, stride);
        } else {
          k == 0 ? ZeroSums<1>(tiles) : LoadSums<1>(tiles, to, stride);
          AddSlices<P, 1>(tiles, a, 0, slice_bytes, w, slices, ahead);
          StoreSums<1>(tiles, to, stride);
        }
      }
    }
  }
}

template <typename P>
  requires P::kAmx
void Gemm(const std::byte* weights, std::int64_t chunks, std::int64_t features,
          const RowTiles& rows, const void* in, std::int64_t, typename P::Total* sums) {
  constexpr decltype(&ManyRows<P>) kByTiles[] = {FewRows<P, 1>, FewRows<P, 2>, FewRows<P, 3>,
                                                 ManyRows<P>};
  kByTiles[std::min<std::int64_t>(rows.count, 4) - 1](weights, chunks, features, rows, in, sums);
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_AMX_INC_H_
