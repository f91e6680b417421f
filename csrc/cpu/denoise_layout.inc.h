// How the weights and activations of `denoise`'s hidden layers lie in memory, by precision, and
// what one instruction does with them. Part of denoise_kernels.inc.h, compiled once an instruction
// set.
//
// A hidden layer is out[m, f] = sum over k of in[m, k] W[f, k]. W is packed once (PackChunk) in the
// order in which a tile of kTileRows x kPanel sums reads it:
//
//   chunk of kChunk units | block of kDepth elements of k | panel of kPanel units |
//   kGroup elements of k | units of the panel | the group's elements
//
// so a chunk is one stream, whatever the number of rows. Activations lie in the order in which a
// tile reads them, too: the rows of a tile side by side, kGroup elements of k of each, and then the
// next kGroup. (Row after row they would be a stride of pages apart, and a block of many rows would
// share a few sets of the caches: at 192 rows that costs a tenth of the time.)
#ifndef DIFFMIC_CPU_DENOISE_LAYOUT_INC_H_
#define DIFFMIC_CPU_DENOISE_LAYOUT_INC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/denoise_kernels.h"
#include "cpu/simd.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kPanels = kChunk / kPanel;
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
static_assert(kChunk % kPanel == 0);

// ---- one precision each: how weights and activations lie, and what is done with them

struct Float32Product {
  using Weight = float;
  using Activation = float;
  using Sum = Vec;
  struct Operand {
    Vec v;
  };
  static constexpr int kGroup = 1;
  static constexpr int kParts = 1;
  static constexpr bool kScaled = false;
  static constexpr int kStreamRows = kTileRows / 2;

  static Vec Finish(Sum sum) { return sum; }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {Load(w)};
  }
  template <int>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    const Vec element = Set(*a);
    AddProduct(element, w_low.v, low);
    AddProduct(element, w_high.v, high);
  }
  static void Round(Vec value, Activation* numbers) { Store(numbers, value); }
};

#if defined(DIFFMIC_SIMD_AVX512_BF16)

// Two elements at a time: sum + odd product, rounded, + even product, rounded; denormal numbers
// count as 0.
struct BFloat16Product {
  using Weight = std::uint16_t;
  using Activation = std::uint16_t;
  using Sum = Vec;
  struct Operand {
    __m512i v;
  };
  static constexpr int kGroup = 2;
  static constexpr int kParts = 1;
  static constexpr bool kScaled = false;
  static constexpr int kStreamRows = kTileRows / 2;

  static Vec Finish(Sum sum) { return sum; }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {_mm512_loadu_si512(w)};
  }
  template <int>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    std::int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    const auto elements = (__m512bh)_mm512_set1_epi32(pair);
    low.v = _mm512_dpbf16_ps(low.v, elements, (__m512bh)w_low.v);
    high.v = _mm512_dpbf16_ps(high.v, elements, (__m512bh)w_high.v);
  }
  static void Round(Vec value, Activation* numbers) {
    StoreBFloat16(numbers, RoundToBFloat16(value));
  }
};

#else

// bfloat16 numbers, float32 arithmetic: a product of two of them is exact, and fused with its sum.
struct BFloat16Product {
  using Weight = std::uint16_t;
  using Activation = float;  // rounded
  using Sum = Vec;
  struct Operand {
    Vec v;
  };
  static constexpr int kGroup = 2;
  static constexpr int kParts = 2;  // one after the other, or 16 registers would not do
  static constexpr bool kScaled = false;
  static constexpr int kStreamRows = kLanes >= 8 ? 1 : 0;

  static Vec Finish(Sum sum) { return sum; }
  template <int kPart>
  static Operand LoadWeights(const Weight* w) {
    const Pairs pairs = LoadPairs(w);
    return {kPart == 0 ? Even(pairs) : Odd(pairs)};
  }
  template <int kPart>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    Float32Product::MultiplyAdd<0>(a + kPart, {w_low.v}, {w_high.v}, low, high);
  }
  static void Round(Vec value, Activation* numbers) { Store(numbers, RoundToBFloat16(value)); }
};

#endif

#if defined(DIFFMIC_SIMD_AVX512_BF16)

// The instruction multiplies unsigned bytes by signed ones. Activations are therefore kept 128 too
// large, and a block's sums begin with what that adds, -128 times the sum of its weights, which
// lies in front of the block.
struct Int8Product {
  using Weight = std::int8_t;
  using Activation = std::uint8_t;
  using Sum = Ints;
  struct Operand {
    __m512i v;
  };
  static constexpr int kGroup = 4;
  static constexpr int kParts = 1;
  static constexpr bool kScaled = true;
  static constexpr int kStreamRows = kTileRows / 2;
  static constexpr int kOffset = 128;

  static Sum Begin(const std::int32_t* front) { return {_mm512_loadu_si512(front)}; }
  static Vec Finish(Sum sum) { return ToFloat(sum); }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {_mm512_loadu_si512(w)};
  }
  template <int>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    std::int32_t four;
    std::memcpy(&four, a, sizeof four);
    const __m512i elements = _mm512_set1_epi32(four);
    Add(elements, w_low.v, low);
    Add(elements, w_high.v, high);
  }

 private:
  // _mm512_dpbusd_epi32, in the sum's own register as in AddProducts of simd.h.
  static void Add(__m512i a, __m512i w, Sum& sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a), "v"(w));
  }
};

#else

// Pairs of bytes widened to 16 bits; sums of their products are exact.
struct Int8Product {
  using Weight = std::int8_t;
  using Activation = std::int16_t;
  using Sum = Ints;
  struct Operand {
    Ints v;
  };
  static constexpr int kGroup = 2;
  static constexpr int kParts = 1;
  static constexpr bool kScaled = true;
  static constexpr int kStreamRows = 0;
  static constexpr int kOffset = 0;

  static Sum Begin(const std::int32_t*) { return ZeroInts(); }
  static Vec Finish(Sum sum) { return ToFloat(sum); }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {LoadBytePairs(w)};
  }
  template <int>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    const Ints pair = SetPair(a);
    AddProducts(pair, w_low.v, low);
    AddProducts(pair, w_high.v, high);
  }
};

#endif

// A block of int8 products is a whole number below 2^24, which float32 holds.
static_assert(kDepth * 127 * (127 + 1) < 1 << 24);

// ---- packing

// Bytes in front of a panel's block: where its sums begin, if that is not 0.
template <typename Product>
constexpr std::int64_t FrontBytes() {
  if constexpr (Product::kScaled) return Product::kOffset == 0 ? 0 : kPanel * 4;
  return 0;
}

// Bytes of a panel's block of `depth` elements.
template <typename Product>
constexpr std::int64_t BlockBytes(std::int64_t depth) {
  const std::int64_t groups = (depth + Product::kGroup - 1) / Product::kGroup;
  return FrontBytes<Product>() + groups * Product::kGroup * kPanel *
                                     static_cast<std::int64_t>(sizeof(typename Product::Weight));
}

template <typename Product>
std::int64_t ChunkBytesOf(std::int64_t features) {
  const std::int64_t panels = kChunk / kPanel;
  return panels * (features / kDepth * BlockBytes<Product>(kDepth) +
                   (features % kDepth == 0 ? 0 : BlockBytes<Product>(features % kDepth)));
}

// max |x| of a row, and its 127th part: the step of its bytes. Not a number where an element is
// infinite or not a number, which a byte could not say; 0 for a row of (next to) nothing.
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
// each(k, whole numbers, their count) for kLanes elements of a row at a time.
template <typename Each>
void ForBytes(const float* x, std::int64_t count, float inverse, const Each& each) {
  std::int32_t numbers[kLanes];
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - k));
    const Vec v = part == kLanes ? Load(x + k) : LoadPart(x + k, part);
    StoreInts(numbers, ToInts(Round(v * Set(inverse))));
    each(k, numbers, part);
  }
}
inline void Convert(const float* w, std::int64_t depth, float inverse, std::int8_t* out) {
  ForBytes(w, depth, inverse, [&](std::int64_t k, const std::int32_t* numbers, int count) {
    for (int i = 0; i < count; ++i) out[k + i] = static_cast<std::int8_t>(numbers[i]);
  });
}

// Packs `units` rows of W; what is left of the chunk is filled up with zeros.
template <typename Product>
void PackChunkOf(const float* weight, std::int64_t stride, int units, std::int64_t features,
                 std::byte* out, float* unit_scale) {
  using Weight = typename Product::Weight;
  constexpr std::int64_t kGroup = Product::kGroup;
  float inverse[kChunk] = {};
  if constexpr (Product::kScaled) {
    for (int n = 0; n < units; ++n) {
      unit_scale[n] = ByteScale(weight + n * stride, features, inverse + n);
    }
  }
  for (std::int64_t k = 0; k < features; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, features - k);
    for (int panel = 0; panel < kChunk; panel += kPanel) {
      const std::int64_t bytes = BlockBytes<Product>(depth);
      std::memset(out, 0, static_cast<std::size_t>(bytes));
      auto* packed = reinterpret_cast<Weight*>(out + FrontBytes<Product>());
      for (int n = 0; n < std::min(kPanel, units - panel); ++n) {
        Weight row[kDepth];
        Convert(weight + (panel + n) * stride + k, depth, inverse[panel + n], row);
        for (std::int64_t i = 0; i < depth; ++i) {
          packed[i / kGroup * kGroup * kPanel + n * kGroup + i % kGroup] = row[i];
        }
        if constexpr (FrontBytes<Product>() > 0) {
          std::int32_t sum = 0;
          for (std::int64_t i = 0; i < depth; ++i) sum += row[i];
          sum *= -Product::kOffset;
          std::memcpy(out + 4 * n, &sum, sizeof sum);
        }
      }
      out += bytes;
    }
  }
}

// ---- activations

// How rows fall into tiles: of nearly one size, the first ones a row larger where it must be.
struct Tiles {
  explicit Tiles(std::int64_t rows)
      : count((rows + kTileRows - 1) / kTileRows), size(rows / count), larger(rows % count) {}

  std::int64_t Begin(std::int64_t tile) const { return tile * size + std::min(tile, larger); }
  int Size(std::int64_t tile) const { return static_cast<int>(size + (tile < larger ? 1 : 0)); }
  std::int64_t Of(std::int64_t row) const {
    const std::int64_t in_larger = larger * (size + 1);
    return row < in_larger ? row / (size + 1) : larger + (row - in_larger) / size;
  }

  std::int64_t count, size, larger;
};

// Where a row's activations lie: kGroup of them at a time, beside those of its tile's other rows.
template <typename Product>
class ActivationRow {
 public:
  using Activation = typename Product::Activation;
  static constexpr int kGroup = Product::kGroup;

  ActivationRow(const Tiles& tiles, std::int64_t row, std::int64_t row_bytes, void* activations) {
    const std::int64_t tile = tiles.Of(row);
    const std::int64_t begin = tiles.Begin(tile);
    step_ = std::int64_t{tiles.Size(tile)} * kGroup;
    to_ = reinterpret_cast<Activation*>(static_cast<std::byte*>(activations) + begin * row_bytes) +
          (row - begin) * kGroup;
  }

  // Elements [k, k + count) of the row, k a multiple of kGroup. What is left of a group at the end
  // is 0: it meets weights of 0, and must not be what another row left there, which may be
  // anything.
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

#endif  // DIFFMIC_CPU_DENOISE_LAYOUT_INC_H_
