// The products of `denoise`: sums along k of activations and packed weights, by precision. Part of
// denoise_kernels.inc.h, compiled once an instruction set.
//
// A hidden layer is out[m, f] = sum over k of in[m, k] W[f, k]. W is packed once (PackChunk) in the
// order in which a tile of kTileRows x kPanel sums reads it:
//
//   chunk of kChunk units | block of kDepth elements of k | panel of kPanel units |
//   kGroup elements of k | units of the panel | the group's elements
//
// so a chunk is one stream, whatever the number of rows. A thread takes a chunk and goes along it:
// a block of a panel (16 KB of float32 with AVX2) comes from memory once, prefetched while the one
// before it is in use, and stays in L1 for all tiles of rows. For an element of k a tile reads two
// vectors of weights and one number a row, and does two multiply-adds a row: with 6 rows (16
// registers) or 12 (32), 12 or 24 multiply-adds against 8 or 14 loads, so the sums' arithmetic
// bounds it, not the caches.
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
#include <cstring>
#include <utility>

#include "cpu/denoise_kernels.h"
#include "cpu/simd.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
constexpr int kUnroll = 4;  // groups between two looks at what to prefetch
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

  static Vec Finish(Sum sum) { return sum; }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {Load(w)};
  }
  template <int>
  static Sum MultiplyAdd(const Activation* a, Operand w, Sum sum) {
    return Fma(Set(*a), w.v, sum);
  }
  static void StoreActivations(Activation* row, Vec value, int count) {
    count == kLanes ? Store(row, value) : StorePart(row, value, count);
  }
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

  static Vec Finish(Sum sum) { return sum; }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {_mm512_loadu_si512(w)};
  }
  template <int>
  static Sum MultiplyAdd(const Activation* a, Operand w, Sum sum) {
    std::int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w.v)};
  }
  static void StoreActivations(Activation* row, Vec value, int count) {
    Activation numbers[kLanes];
    StoreBFloat16(numbers, RoundToBFloat16(value));
    std::copy_n(numbers, count, row);
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

  static Vec Finish(Sum sum) { return sum; }
  template <int kPart>
  static Operand LoadWeights(const Weight* w) {
    const Pairs pairs = LoadPairs(w);
    return {kPart == 0 ? Even(pairs) : Odd(pairs)};
  }
  template <int kPart>
  static Sum MultiplyAdd(const Activation* a, Operand w, Sum sum) {
    return Fma(Set(a[kPart]), w.v, sum);
  }
  static void StoreActivations(Activation* row, Vec value, int count) {
    Float32Product::StoreActivations(row, RoundToBFloat16(value), count);
  }
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
  static constexpr int kOffset = 128;

  static Sum Begin(const std::int32_t* front) { return {_mm512_loadu_si512(front)}; }
  static Vec Finish(Sum sum) { return ToFloat(sum); }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {_mm512_loadu_si512(w)};
  }
  template <int>
  static Sum MultiplyAdd(const Activation* a, Operand w, Sum sum) {
    std::int32_t four;
    std::memcpy(&four, a, sizeof four);
    return {_mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(four), w.v)};
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
  static constexpr int kOffset = 0;

  static Sum Begin(const std::int32_t*) { return ZeroInts(); }
  static Vec Finish(Sum sum) { return ToFloat(sum); }
  template <int>
  static Operand LoadWeights(const Weight* w) {
    return {LoadBytePairs(w)};
  }
  template <int>
  static Sum MultiplyAdd(const Activation* a, Operand w, Sum sum) {
    return AddProducts(a, w.v, sum);
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
template <typename Integer>
void ConvertToBytes(const float* x, std::int64_t count, float inverse, int offset, Integer* out) {
  std::int32_t numbers[kLanes];
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int part = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    const Vec v = part == kLanes ? Load(x + i) : LoadPart(x + i, part);
    StoreInts(numbers, ToInts(Round(v * Set(inverse))));
    for (int j = 0; j < part; ++j) out[i + j] = static_cast<Integer>(numbers[j] + offset);
  }
}
inline void Convert(const float* w, std::int64_t depth, float inverse, std::int8_t* out) {
  ConvertToBytes(w, depth, inverse, 0, out);
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

// ---- tiles

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

// The sums of two vectors of units in a row. Rows are told apart by types (Rows below), never by a
// variable: arrays of vectors, GCC keeps in memory.
template <typename Product, int>
struct RowSums {
  typename Product::Sum low, high;

  template <int kPart, typename Operand>
  [[gnu::always_inline]] void Add(const typename Product::Activation* a, Operand w_low,
                                  Operand w_high) {
    low = Product::template MultiplyAdd<kPart>(a, w_low, low);
    high = Product::template MultiplyAdd<kPart>(a, w_high, high);
    if constexpr (Product::kScaled) {
      Keep(low.v);
      Keep(high.v);
    }
  }
};

template <typename Product, typename Numbers>
struct Rows;

template <typename Product, int... kRow>
struct Rows<Product, std::integer_sequence<int, kRow...>> : RowSums<Product, kRow>... {
  using Activation = typename Product::Activation;

  void Begin(const std::byte* block) {
    const auto* front = reinterpret_cast<const std::int32_t*>(block);
    const auto low = DIFFMIC_SIMD::Begin<Product>(front);
    const auto high = DIFFMIC_SIMD::Begin<Product>(front + kLanes);
    ((RowSums<Product, kRow>::low = low, RowSums<Product, kRow>::high = high), ...);
  }

  template <int kPart>
  [[gnu::always_inline]] void Add(const Activation* a, std::int64_t a_stride,
                                  const typename Product::Weight* w) {
    const auto low = Product::template LoadWeights<kPart>(w);
    const auto high = Product::template LoadWeights<kPart>(w + Product::kGroup * kLanes);
    (RowSums<Product, kRow>::template Add<kPart>(a + kRow * a_stride, low, high), ...);
  }

  void AddGroup(const Activation* a, std::int64_t a_stride, const typename Product::Weight* w) {
    Add<0>(a, a_stride, w);
    if constexpr (Product::kParts == 2) Add<1>(a, a_stride, w);
  }

  void End(bool first, float* sums) const {
    (End(RowSums<Product, kRow>::low, first, sums + kRow * kChunk), ...);
    (End(RowSums<Product, kRow>::high, first, sums + kRow * kChunk + kLanes), ...);
  }

 private:
  static void End(typename Product::Sum sum, bool first, float* to) {
    const Vec block_sum = Product::Finish(sum);
    Store(to, first ? block_sum : Load(to) + block_sum);
  }
};

// sums[m * kChunk + n] = or += a_m . w_n, for kM rows and a panel of units.
template <typename Product, int kM>
void Tile(const typename Product::Activation* a, std::int64_t a_stride, const std::byte* block,
          std::int64_t depth, Ahead ahead, bool first, float* sums) {
  constexpr int kGroup = Product::kGroup;
  const auto* w = reinterpret_cast<const typename Product::Weight*>(block + FrontBytes<Product>());
  const std::int64_t groups = (depth + kGroup - 1) / kGroup;
  Rows<Product, std::make_integer_sequence<int, kM>> rows;
  rows.Begin(block);
  std::int64_t g = 0;
  for (; g + kUnroll <= groups; g += kUnroll) {
    for (int line = 0; line < ahead.lines; ++line, ahead.next += 64) Prefetch(ahead.next);
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) {
      rows.AddGroup(a + (g + i) * kGroup, a_stride, w + (g + i) * kGroup * kPanel);
    }
  }
  for (; g < groups; ++g) rows.AddGroup(a + g * kGroup, a_stride, w + g * kGroup * kPanel);
  rows.End(first, sums);
}

template <typename Product, int kM = kTileRows>
void TileOf(int rows, const typename Product::Activation* a, std::int64_t a_stride,
            const std::byte* block, std::int64_t depth, Ahead ahead, bool first, float* sums) {
  if (rows == kM) return Tile<Product, kM>(a, a_stride, block, depth, ahead, first, sums);
  if constexpr (kM > 1) {
    TileOf<Product, kM - 1>(rows, a, a_stride, block, depth, ahead, first, sums);
  }
}

// sums [rows, kChunk] = in . W^T for the chunk of W at `chunk`.
template <typename Product>
void ChunkProduct(const std::byte* chunk, std::int64_t features, std::int64_t rows, const void* in,
                  std::int64_t row_bytes, float* sums) {
  using Activation = typename Product::Activation;
  const auto* a = static_cast<const Activation*>(in);
  const std::int64_t a_stride = row_bytes / static_cast<std::int64_t>(sizeof(Activation));
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (std::int64_t k = 0; k < features; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, features - k);
    for (int panel = 0; panel < kChunk; panel += kPanel) {
      const std::byte* next = chunk + BlockBytes<Product>(depth);
      const bool last = k + depth == features && panel + kPanel == kChunk;
      // Lines a look, so that the tiles together fetch a block.
      const std::int64_t looks = std::max<std::int64_t>(1, depth / Product::kGroup / kUnroll);
      const std::int64_t lines = BlockBytes<Product>(depth) / 64;
      const std::int64_t each = (lines + looks * tiles - 1) / (looks * tiles);
      std::int64_t row = 0;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const auto count = static_cast<int>((rows - row + tiles - tile - 1) / (tiles - tile));
        const std::int64_t ahead = tile * looks * each;
        TileOf<Product>(count, a + row * a_stride + k, a_stride, chunk, depth,
                        {next + 64 * ahead, last || ahead >= lines ? 0 : static_cast<int>(each)},
                        k == 0, sums + row * kChunk + panel);
        row += count;
      }
      chunk = next;
    }
  }
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_PRODUCTS_INC_H_
