// How the weights and activations of `denoise`'s hidden layers lie in memory. Part of
// denoise_kernels.inc.h, compiled once an instruction set.
//
// A hidden layer is out[m, f] = sum over k of in[m, k] W[f, k]. W is packed once (PackChunkOf) in
// the order in which a product reads it:
//
//   chunk of kChunk units | block of kDepth elements of k | panel of kPanel units |
//   kGroup elements of k | units of the panel | the group's elements
//
// so a chunk is one stream, whatever the number of rows. Where an instruction takes unsigned
// activations (kOffset), the initial sums of the chunk's units precede it. The activations of a
// tile of rows are adjacent, too: kGroup elements of k of each row, and then the next kGroup. (As a
// row-major matrix, rows would be a stride of pages apart, and a block of many rows would share a
// few sets of the caches: at 192 rows that costs a tenth of the time.)
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_precisions.inc.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// ---- packing

// Bytes before a chunk: the initial sums of its units, if they are not 0.
template <typename Product>
constexpr std::int64_t kFrontBytes = Product::kOffset == 0 ? 0 : kChunk * 4;

// Groups of `depth` elements, as a chunk is padded.
template <typename Product>
constexpr std::int64_t GroupsOf(std::int64_t depth) {
  const std::int64_t groups = (depth + Product::kGroup - 1) / Product::kGroup;
  return (groups + Product::kMultiple - 1) / Product::kMultiple * Product::kMultiple;
}

// Bytes of a panel's block of `depth` elements.
template <typename Product>
constexpr std::int64_t BlockBytes(std::int64_t depth) {
  return GroupsOf<Product>(depth) * Product::kGroup * Product::kPanel *
         static_cast<std::int64_t>(sizeof(typename Product::Weight));
}

template <typename Product>
constexpr int kPanels = static_cast<int>(kChunk / Product::kPanel);

template <typename Product>
std::int64_t ChunkBytesOf(std::int64_t features) {
  return kFrontBytes<Product> +
         kPanels<Product> * (features / kDepth * BlockBytes<Product>(kDepth) +
                             (features % kDepth == 0 ? 0 : BlockBytes<Product>(features % kDepth)));
}

// The scale of a row's bytes, amax / 127, and its inverse. NaN where an element is infinite or NaN,
// which a byte cannot represent; 0 for a row of zeros, or next to them.
inline float ByteScale(const float* x, std::int64_t count, float* inverse) {
  Vec most = Zero();
  Vec invalid = Zero();
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    const Vec v = part == kLanes ? Load(x + i) : LoadPart(x + i, part);
    most = Max(Zero() - NegativeAbs(v), most);
    invalid = invalid + v * Zero();
  }
  float lanes[kLanes];
  Store(lanes, most);
  const float largest = *std::max_element(lanes, lanes + kLanes);
  *inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  return (largest > 1e-30f ? largest / 127.0f : 0.0f) + Sum(invalid);
}

// The elements of one row of W as they are packed.
inline void Convert(const float* w, std::int64_t depth, float, float* out) {
  std::copy_n(w, depth, out);
}
inline void Convert(const float* w, std::int64_t depth, float, std::uint16_t* out) {
  std::uint16_t numbers[kLanes];
  for (std::int64_t k = 0; k < depth; k += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, depth - k));
    StoreBFloat16(numbers, RoundToBFloat16(part == kLanes ? Load(w + k) : LoadPart(w + k, part)));
    std::copy_n(numbers, part, out + k);
  }
}
// Calls each(k, integers, count) for kLanes elements at a time. NaN becomes 0: its row's scale is
// NaN.
template <typename Each>
void ForBytes(const float* x, std::int64_t count, float inverse, const Each& each) {
  std::int32_t numbers[kLanes];
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - k));
    const Vec v = part == kLanes ? Load(x + k) : LoadPart(x + k, part);
    StoreInts(numbers, ToInts(Round(ZeroNan(v * Set(inverse)))));
    each(k, numbers, part);
  }
}
inline void Convert(const float* w, std::int64_t depth, float inverse, std::int8_t* out) {
  ForBytes(w, depth, inverse, [&](std::int64_t k, const std::int32_t* numbers, int count) {
    for (int i = 0; i < count; ++i) out[k + i] = static_cast<std::int8_t>(numbers[i]);
  });
}

// Packs `units` rows of W. The rest of the chunk, and of its last groups, is zero.
template <typename Product>
void PackChunkOf(const float* weight, std::int64_t stride, int units, std::int64_t features,
                 std::byte* out, float* unit_scale) {
  using Weight = typename Product::Weight;
  constexpr std::int64_t kGroup = Product::kGroup;
  constexpr int kPanel = Product::kPanel;
  float inverse[kChunk] = {};
  if constexpr (Product::kScaled) {
    for (int n = 0; n < units; ++n) {
      unit_scale[n] = ByteScale(weight + n * stride, features, inverse + n);
    }
  }
  std::uint32_t front[kChunk] = {};  // modulo 2^32, as the sums that begin with them
  std::byte* block = out + kFrontBytes<Product>;
  for (std::int64_t k = 0; k < features; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, features - k);
    for (int panel = 0; panel < kChunk; panel += kPanel) {
      std::memset(block, 0, static_cast<std::size_t>(BlockBytes<Product>(depth)));
      auto* packed = reinterpret_cast<Weight*>(block);
      for (int n = 0; n < std::min(kPanel, units - panel); ++n) {
        Weight row[kDepth];
        Convert(weight + (panel + n) * stride + k, depth, inverse[panel + n], row);
        for (std::int64_t i = 0; i < depth; ++i) {
          packed[i / kGroup * kGroup * kPanel + n * kGroup + i % kGroup] = row[i];
        }
        if constexpr (Product::kOffset != 0) {
          for (std::int64_t i = 0; i < depth; ++i) {
            front[panel + n] -= static_cast<std::uint32_t>(Product::kOffset * row[i]);
          }
        }
      }
      block += BlockBytes<Product>(depth);
    }
  }
  if constexpr (kFrontBytes<Product> > 0) std::memcpy(out, front, sizeof front);
}

// ---- activations

// How rows are divided into tiles of nearly one size. Vector products: the first ones a row larger
// where they must be. AMX: tiles of equal size, the last one may have padding rows.
struct RowTiles {
  template <typename Product>
  static RowTiles Of(std::int64_t rows) {
    const std::int64_t count = (rows + Product::kMostRows - 1) / Product::kMostRows;
    if (Product::kAmx) return {rows, count, (rows + count - 1) / count, 0};
    return {rows, count, rows / count, rows % count};
  }

  std::int64_t Begin(std::int64_t tile) const { return tile * size + std::min(tile, larger); }
  int Size(std::int64_t tile) const {
    return static_cast<int>(std::min(size + (tile < larger ? 1 : 0), rows - Begin(tile)));
  }

  std::int64_t rows, count, size, larger;
};

// A row and its place in a tile; a loop over rows needs no division.
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

// Where the vector products read a row's activations: kGroup of them at a time, beside those of the
// other rows of its tile.
template <typename Product>
class VectorRow {
 public:
  using Activation = typename Product::Activation;
  static constexpr int kGroup = Product::kGroup;

  VectorRow(const DenoiserView& model, const RowTiles& tiles, const Place& place, void* activations)
      : to_(reinterpret_cast<Activation*>(static_cast<std::byte*>(activations) +
                                          (place.row - place.within) * model.stride * 4) +
            place.within * kGroup),
        step_(std::int64_t{tiles.Size(place.tile)} * kGroup) {}

  // Elements [k, k + count) of the row, k a multiple of kGroup. The rest of the last group is 0:
  // it is multiplied by weights of 0, and must not be what another row left there, such as NaN.
  void Set(std::int64_t k, const Activation* numbers, int count) const {
    Activation* to = to_ + k / kGroup * step_;
    int i = 0;
    for (; i + kGroup <= count; i += kGroup, to += step_) std::copy_n(numbers + i, kGroup, to);
    if (i == count) return;
    for (int j = 0; j < kGroup; ++j) to[j] = i + j < count ? numbers[i + j] : Activation{0};
  }

 private:
  Activation* to_;
  std::int64_t step_;
};

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_LAYOUT_INC_H_
