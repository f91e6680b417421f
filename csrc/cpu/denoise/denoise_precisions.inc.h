// The vector arithmetic of each precision of `denoise`'s hidden layers: how an element is stored,
// and what one instruction does with a group of elements. Part of denoise_kernels.inc.h, compiled
// once an instruction set. The tile arithmetic of AMX is in denoise_amx.inc.h.
//
// A precision defines
//   Weight, Activation   a packed element of W, and of a row
//   Total                a sum in memory: float, or int32 with kInt8
//   Sum                  a vector of sums in a register
//   kGroup               elements of k that lie together
//   kMultiple                groups that a packed chunk is padded to
//   kPanel               units that lie together
//   kToL2                whether weights are prefetched to L2, a few rows' own ahead of themselves:
//                        where memory bounds. Where widening does, the next block goes to L1
//   kOffset              what is added to an activation of kInt8, for an unsigned operand
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_PRECISIONS_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_PRECISIONS_INC_H_

#include <cstdint>
#include <cstring>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
#if defined(DIFFMIC_SIMD_AMX)
constexpr bool kAmxSet = true;
#else
constexpr bool kAmxSet = false;
#endif

// Common to the vector precisions: tiles of kTileRows rows x 2 vectors of units.
struct VectorPrecision {
  static constexpr bool kAmx = false;
  static constexpr int kMultiple = 1;
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kMostRows = kTileRows;

  // The most chunks that share a pass over the activations: with many rows those come from L2 once
  // a group.
  static std::int64_t GroupChunks(std::int64_t rows) { return rows <= 64 ? 1 : 16; }
};
static_assert(kChunk % VectorPrecision::kPanel == 0);

// Sums of float32. A block of kDepth elements is summed in registers from 0, and blocks are added
// in their order: the order of a sum depends on nothing else.
struct FloatSums : VectorPrecision {
  using Total = float;
  using Sum = Vec;
  static constexpr bool kScaled = false;
  static constexpr int kOffset = 0;

  static Sum ZeroSum() { return Zero(); }
  static Sum LoadSum(const Total* p) { return Load(p); }
  static void StoreSum(Total* p, Sum sum) { Store(p, sum); }
  static Sum AddSums(Sum a, Sum b) { return a + b; }
  static Vec ToVec(Sum sum) { return sum; }
};

// Sums of int32 over all of k, modulo 2^32 on the way: exact up to kMostInt8Features.
struct IntSums : VectorPrecision {
  using Total = std::int32_t;
  using Sum = Ints;
  static constexpr bool kScaled = true;

  static Sum ZeroSum() { return ZeroInts(); }
  static Sum LoadSum(const Total* p) { return LoadInts(p); }
  static void StoreSum(Total* p, Sum sum) { StoreInts(p, sum); }
  static Vec ToVec(Sum sum) { return ToFloat(sum); }
};

struct Float32 : FloatSums {
  using Weight = float;
  using Activation = float;
  struct Operand {
    Vec v;
  };
  static constexpr bool kToL2 = true;
  static constexpr int kGroup = 1;
  static constexpr int kParts = 1;

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
struct VectorBFloat16 : FloatSums {
  using Weight = std::uint16_t;
  using Activation = std::uint16_t;
  struct Operand {
    __m512i v;
  };
  static constexpr bool kToL2 = true;
  static constexpr int kGroup = 2;
  static constexpr int kParts = 1;

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

// The instruction multiplies unsigned bytes by signed ones. Activations are therefore stored with
// 128 added, and a chunk's sums begin with what that adds, -128 times the sum of its weights.
struct VectorInt8 : IntSums {
  using Weight = std::int8_t;
  using Activation = std::uint8_t;
  struct Operand {
    __m512i v;
  };
  static constexpr bool kToL2 = true;
  static constexpr int kGroup = 4;
  static constexpr int kParts = 1;
  static constexpr int kOffset = 128;

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
#if defined(DIFFMIC_AVX512_EMULATED)
    sum.v = _mm512_dpbusd_epi32(sum.v, a, w);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a), "v"(w));
#endif
  }
};

#else

// bfloat16 numbers, float32 arithmetic: a product of two of them is exact, and fused with its sum.
struct VectorBFloat16 : FloatSums {
  using Weight = std::uint16_t;
  using Activation = float;  // rounded
  struct Operand {
    Vec v;
  };
  static constexpr bool kToL2 = false;
  static constexpr int kGroup = 2;
  static constexpr int kParts = 2;  // loaded one at a time to fit in 16 registers

  template <int kPart>
  static Operand LoadWeights(const Weight* w) {
    const Pairs pairs = LoadPairs(w);
    return {kPart == 0 ? Even(pairs) : Odd(pairs)};
  }
  template <int kPart>
  static void MultiplyAdd(const Activation* a, Operand w_low, Operand w_high, Sum& low, Sum& high) {
    Float32::MultiplyAdd<0>(a + kPart, {w_low.v}, {w_high.v}, low, high);
  }
  static void Round(Vec value, Activation* numbers) { Store(numbers, RoundToBFloat16(value)); }
};

// Pairs of bytes widened to 16 bits.
struct VectorInt8 : IntSums {
  using Weight = std::int8_t;
  using Activation = std::int16_t;
  struct Operand {
    Ints v;
  };
  static constexpr bool kToL2 = false;
  static constexpr int kGroup = 2;
  static constexpr int kParts = 1;
  static constexpr int kOffset = 0;

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

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_PRECISIONS_INC_H_
