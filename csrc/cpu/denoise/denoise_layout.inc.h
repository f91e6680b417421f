// Memory layout of the hidden layers' operands, for the GEMM out[m, f] = sum over k of in[m, k]
// W[f, k]. Part of denoise_kernels.inc.h, compiled once per instruction set.
//
// W is packed once, in the order in which the GEMM reads it:
//
//   chunk of kChunk output channels | block of kDepth elements of k | panel of kPanel channels |
//   kGroup elements of k | channels of the panel | elements of the group
//
// so a chunk is one contiguous stream for any number of rows. With an unsigned activation operand
// (kOffset) the chunk is preceded by the compensation of its channels, -kOffset times the sum of
// their weights. Activations of a tile of rows are interleaved the same way: kGroup elements of k
// of each row, then the next kGroup. (In a row-major matrix, rows lie a multiple of pages apart and
// compete for a few cache sets: at 192 rows that costs a tenth of the time.)
//
// `P` is a precision; denoise_gemm.inc.h lists what it defines.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// ---- packed weights

template <typename P>
constexpr std::int64_t kCompensationBytes = P::kOffset == 0 ? 0 : kChunk * 4;

template <typename P>
constexpr int kPanels = static_cast<int>(kChunk / P::kPanel);

// Groups of `depth` elements of k, padding included.
template <typename P>
constexpr std::int64_t GroupsOf(std::int64_t depth) {
  const std::int64_t groups = (depth + P::kGroup - 1) / P::kGroup;
  return (groups + P::kPadGroups - 1) / P::kPadGroups * P::kPadGroups;
}

// Bytes of `depth` elements of k of a panel.
template <typename P>
constexpr std::int64_t PanelBytes(std::int64_t depth) {
  return GroupsOf<P>(depth) * P::kGroup * P::kPanel *
         static_cast<std::int64_t>(sizeof(typename P::Weight));
}

template <typename P>
std::int64_t ChunkBytes(std::int64_t features) {
  return kCompensationBytes<P> + kPanels<P> * (features / kDepth * PanelBytes<P>(kDepth) +
                                               PanelBytes<P>(features % kDepth));
}

inline Vec LoadUpTo(const float* p, int count) {
  return count == kLanes ? Load(p) : LoadPart(p, count);
}

// The quantisation scale amax / 127 of a row, and its inverse. NaN if an element is NaN or
// infinite, which int8 cannot represent; 0 for a row that is (nearly) all zeros.
inline float QuantisationScale(const float* x, std::int64_t count, float* inverse) {
  Vec largest = Zero();
  Vec invalid = Zero();
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Vec v = LoadUpTo(x + i, static_cast<int>(std::min<std::int64_t>(kLanes, count - i)));
    largest = Max(Zero() - NegativeAbs(v), largest);
    invalid = invalid + v * Zero();
  }
  float lanes[kLanes];
  Store(lanes, largest);
  const float amax = *std::max_element(lanes, lanes + kLanes);
  *inverse = amax > 1e-30f ? 127.0f / amax : 0.0f;
  return (amax > 1e-30f ? amax / 127.0f : 0.0f) + Sum(invalid);
}

// Calls each(k, integers, count) for kLanes quantised elements at a time. NaN becomes 0: the scale
// of its row is NaN.
template <typename Each>
void ForQuantised(const float* x, std::int64_t count, float inverse, const Each& each) {
  std::int32_t integers[kLanes];
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - k));
    StoreInts(integers, ToInts(Round(ZeroNan(LoadUpTo(x + k, part) * Set(inverse)))));
    each(k, integers, part);
  }
}

// Converts elements of a row of W to their packed type.
inline void Convert(const float* w, std::int64_t depth, float, float* out) {
  std::copy_n(w, depth, out);
}
inline void Convert(const float* w, std::int64_t depth, float, std::uint16_t* out) {
  std::uint16_t rounded[kLanes];
  for (std::int64_t k = 0; k < depth; k += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, depth - k));
    StoreBFloat16(rounded, RoundToBFloat16(LoadUpTo(w + k, part)));
    std::copy_n(rounded, part, out + k);
  }
}
inline void Convert(const float* w, std::int64_t depth, float inverse, std::int8_t* out) {
  ForQuantised(w, depth, inverse, [&](std::int64_t k, const std::int32_t* integers, int count) {
    for (int i = 0; i < count; ++i) out[k + i] = static_cast<std::int8_t>(integers[i]);
  });
}

// Packs `channels` rows of W as a chunk, with zeros for missing channels and elements.
template <typename P>
void PackChunk(const float* weight, std::int64_t stride, int channels, std::int64_t features,
               std::byte* out, float* channel_scale) {
  using Weight = typename P::Weight;
  constexpr std::int64_t kGroup = P::kGroup;
  constexpr int kPanel = P::kPanel;
  float inverse[kChunk] = {};
  if constexpr (P::kQuantised) {
    for (int n = 0; n < channels; ++n) {
      channel_scale[n] = QuantisationScale(weight + n * stride, features, inverse + n);
    }
  }
  std::uint32_t compensation[kChunk] = {};  // modulo 2^32, as the accumulators
  std::byte* block = out + kCompensationBytes<P>;
  for (std::int64_t k = 0; k < features; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, features - k);
    for (int panel = 0; panel < kChunk; panel += kPanel) {
      std::memset(block, 0, static_cast<std::size_t>(PanelBytes<P>(depth)));
      auto* packed = reinterpret_cast<Weight*>(block);
      for (int n = 0; n < std::min(kPanel, channels - panel); ++n) {
        Weight row[kDepth];
        Convert(weight + (panel + n) * stride + k, depth, inverse[panel + n], row);
        for (std::int64_t i = 0; i < depth; ++i) {
          packed[i / kGroup * kGroup * kPanel + n * kGroup + i % kGroup] = row[i];
          if constexpr (P::kOffset != 0) {
            compensation[panel + n] -= static_cast<std::uint32_t>(P::kOffset * row[i]);
          }
        }
      }
      block += PanelBytes<P>(depth);
    }
  }
  if constexpr (P::kOffset != 0) std::memcpy(out, compensation, sizeof compensation);
}

// ---- activations

// How rows are divided into tiles of nearly equal size. Vector GEMM: the first `larger` tiles have
// one row more. AMX: all tiles have `size` rows, the last one may be padded.
struct RowTiles {
  template <typename P>
  static RowTiles Of(std::int64_t rows) {
    const std::int64_t count = (rows + P::kTileRows - 1) / P::kTileRows;
    if (P::kAmx) return {rows, count, (rows + count - 1) / count, 0};
    return {rows, count, rows / count, rows % count};
  }

  std::int64_t Begin(std::int64_t tile) const { return tile * size + std::min(tile, larger); }
  int Size(std::int64_t tile) const {
    return static_cast<int>(std::min(size + (tile < larger ? 1 : 0), rows - Begin(tile)));
  }

  std::int64_t rows, count, size, larger;
};

// A row and its position in a tile; iterating over rows needs no division.
struct Place {
  std::int64_t row = 0, tile = 0;
  int within = 0;

  void Next(const RowTiles& tiles) {
    ++row;
    if (++within < tiles.Size(tile)) return;
    ++tile;
    within = 0;
  }
};

// Writes a row of the vector GEMM's activations.
template <typename P>
class VectorRow {
 public:
  using Activation = typename P::Activation;
  static constexpr int kGroup = P::kGroup;

  VectorRow(const DenoiserView& model, const RowTiles& tiles, const Place& place, void* activations)
      : to_(reinterpret_cast<Activation*>(static_cast<std::byte*>(activations) +
                                          (place.row - place.within) * model.stride * 4) +
            place.within * kGroup),
        group_stride_(std::int64_t{tiles.Size(place.tile)} * kGroup) {}

  // Elements [k, k + count) of the row, k a multiple of kGroup. The rest of the last group becomes
  // 0: its weights are 0, but stale memory may hold NaN.
  void Set(std::int64_t k, const Activation* values, int count) const {
    Activation* to = to_ + k / kGroup * group_stride_;
    int i = 0;
    for (; i + kGroup <= count; i += kGroup, to += group_stride_) {
      std::copy_n(values + i, kGroup, to);
    }
    if (i == count) return;
    for (int j = 0; j < kGroup; ++j) to[j] = i + j < count ? values[i + j] : Activation{0};
  }

 private:
  Activation* to_;
  std::int64_t group_stride_;
};

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_
