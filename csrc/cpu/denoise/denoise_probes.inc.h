// Probes of the two bounds that benchmarks compare the kernels of `denoise` with: memory bandwidth
// and multiply-add throughput. Part of denoise_kernels.inc.h, compiled once per instruction set.
//
// A bound must be the best that the processor reaches, or the kernels would look better than they
// are. The fastest access pattern and the fastest instruction differ between processors, so each
// probe has several implementations, and the process keeps the fastest.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_PROBES_INC_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_PROBES_INC_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cpu/common/simd.h"
#include "cpu/denoise/denoise_gemm.inc.h"
#include "cpu/denoise/denoise_probes.h"
#if defined(DIFFMIC_SIMD_AMX)
#include "cpu/denoise/denoise_amx.inc.h"
#endif

namespace diffmic::cpu::DIFFMIC_SIMD {
namespace {

// ---- memory

// The sum of `count` floats, by one of kReaders. The hardware prefetcher stops at the end of a page
// and follows few streams at full speed. A thread of Zen 4, 4 KB pages: 17 GB/s from one stream, 22
// from four, 27 from eight that are prefetched.
template <int kStreams, int kAhead>
float ReadStreams(const float* in, std::int64_t count) {
  constexpr int kLine = 64 / sizeof(float);
  constexpr int kVectors = kLine / kLanes;
  constexpr int kSums = std::max(kStreams, 4);  // additions in flight
  const std::int64_t part = count / kStreams / kLine * kLine;
  Vec sums[kSums] = {};
  for (std::int64_t i = 0; i < part; i += kLine) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const float* line = in + s * part + i;
      if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead / sizeof(float), 0, 2);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vec& sum = sums[(s * kVectors + v) % kSums];
        sum = sum + Load(line + v * kLanes);
      }
    }
  }
  for (int s = 1; s < kSums; ++s) sums[0] = sums[0] + sums[s];
  float rest = Sum(sums[0]);
  for (std::int64_t i = kStreams * part; i < count; ++i) rest += in[i];
  return rest;
}

template <std::size_t... kIndices>
float ReadBy(std::size_t reader, std::index_sequence<kIndices...>, const float* in,
             std::int64_t count) {
  using Function = float (*)(const float*, std::int64_t);
  constexpr Function kFunctions[] = {
      ReadStreams<kReaders[kIndices].streams, kReaders[kIndices].ahead>...};
  return kFunctions[reader](in, count);
}

float ReadAll(const float* in, std::int64_t count, int reader) {
  return ReadBy(static_cast<std::size_t>(reader), std::make_index_sequence<std::size(kReaders)>(),
                in, count);
}

// ---- multiply-adds

// An instruction on vectors of operands: kProducts multiply-adds per lane.
struct FusedMultiplyAdd {
  using Element = float;
  using Operand = Vec;
  static constexpr int kProducts = 1;
  static Vec LoadOperand(const std::byte* p) { return Load(reinterpret_cast<const float*>(p)); }
  static void Add(Vec a, Vec b, Vec& sum) { AddProduct(a, b, sum); }
};

// Integer accumulators wrap around.
struct IntegerInstruction {
  using Element = std::uint8_t;
  using Operand = Ints;
  static Ints LoadOperand(const std::byte* p) { return LoadInts(p); }
};

// Two products of 16 bits, to which int8 is widened.
struct PairMultiplyAdd : IntegerInstruction {
  static constexpr int kProducts = 2;
  static void Add(Ints a, Ints b, Ints& sum) { AddProducts(a, b, sum); }
};

#if defined(DIFFMIC_SIMD_AVX512_BF16)
struct BFloat16DotProduct : FusedMultiplyAdd {
  using Element = std::uint16_t;
  static constexpr int kProducts = 2;
  static void Add(Vec a, Vec b, Vec& sum) {
#if defined(DIFFMIC_AVX512_EMULATED)
    sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v));
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
#endif
  }
};

struct ByteDotProduct : IntegerInstruction {
  static constexpr int kProducts = 4;
  static void Add(Ints a, Ints b, Ints& sum) { AddByteProducts(a, b, sum); }
};

#elif defined(DIFFMIC_SIMD_AVX512) || defined(DIFFMIC_SIMD_AVX2)
// Four products of int8 in three instructions; sums of two of them saturate at 16 bits.
struct ByteDotProduct : IntegerInstruction {
  static constexpr int kProducts = 4;
  static void Add(Ints a, Ints b, Ints& sum) {
#if defined(DIFFMIC_AVX512_EMULATED)
    const __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
    sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(DIFFMIC_SIMD_AVX512)
    __m512i pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+v"(sum.v), "=&v"(pairs)
        : "v"(a.v), "v"(b.v), "v"(_mm512_set1_epi16(1)));
#else
    __m256i pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum.v), "=&x"(pairs)
        : "x"(a.v), "x"(b.v), "x"(_mm256_set1_epi16(1)));
#endif
  }
};
#endif

// Bytes of operands that a probe reads repeatedly: half of an L1 cache.
constexpr std::int64_t kOperandBytes = 16 * 1024;

struct alignas(64) Operands {
  std::byte bytes[kOperandBytes];
};

// Random operands: int8 of any value, floating-point numbers uniform in [-1, 1). The power of a
// multiplier depends on its operands, so where power limits the clock, zeros would be multiplied
// faster than the elements of a real GEMM.
template <typename Element>
const std::byte* RandomOperands() {
  static const Operands operands = [] {
    Operands made;
    std::uint32_t state = 1;  // Marsaglia's xorshift
    for (std::int64_t i = 0; i < kOperandBytes; i += sizeof(Element)) {
      state ^= state << 13;
      state ^= state >> 17;
      state ^= state << 5;
      std::uint32_t bits = state;
      if constexpr (sizeof(Element) > 1) {
        const float number = static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31f;
        std::memcpy(&bits, &number, sizeof bits);
      }
      if constexpr (sizeof(Element) == 2) bits >>= 16;  // bfloat16: the upper half
      const auto element =
          static_cast<std::conditional_t<sizeof(Element) == 4, std::uint32_t, Element>>(bits);
      std::memcpy(made.bytes + i, &element, sizeof element);
    }
    return made;
  }();
  return operands.bytes;
}

// At least `count` multiply-adds into kA x kB accumulators, each of them the product of one of kA
// vectors of operands and one of kB. With kLoaded every kA + kB vectors are loaded from L1, as in a
// micro-kernel; without, they stay in registers.
template <typename Instruction, int kA, int kB, bool kLoaded>
float MultiplyAddTile(std::int64_t count) {
  constexpr std::int64_t kVector = sizeof(typename Instruction::Operand);
  constexpr std::int64_t kGroups = kOperandBytes / ((kA + kB) * kVector);
  constexpr std::int64_t kStep = kLoaded ? (kA + kB) * kVector : 0;
  constexpr std::int64_t kPass = kGroups * kA * kB * kLanes * Instruction::kProducts;
  const std::byte* operands = RandomOperands<typename Instruction::Element>();
  typename Instruction::Operand sums[kA * kB] = {};
  for (; count > 0; count -= kPass) {
    const std::byte* group = operands;
    for (int g = 0; g < kGroups; ++g, group += kStep) {
      typename Instruction::Operand a[kA];
#pragma GCC unroll 4
      for (int i = 0; i < kA; ++i) a[i] = Instruction::LoadOperand(group + i * kVector);
#pragma GCC unroll 8
      for (int j = 0; j < kB; ++j) {
        const auto b = Instruction::LoadOperand(group + (kA + j) * kVector);
#pragma GCC unroll 4
        for (int i = 0; i < kA; ++i) Instruction::Add(a[i], b, sums[j * kA + i]);
      }
    }
  }
  Vec total = Zero();
#pragma GCC unroll 24
  for (int s = 0; s < kA * kB; ++s) total = total + ToFloat(sums[s]);
  return Sum(total);
}

using Multiplier = float (*)(std::int64_t count);

// The one with the least time for kCount multiply-adds, over kTrials trials each.
Multiplier Fastest(std::initializer_list<Multiplier> multipliers) {
  using Clock = std::chrono::steady_clock;
  constexpr int kTrials = 5;
  constexpr std::int64_t kCount = 1 << 22;
  Multiplier fastest = *multipliers.begin();
  auto least = Clock::duration::max();
  for (int trial = 0; trial < kTrials; ++trial) {
    for (const Multiplier multiply : multipliers) {
      const auto begin = Clock::now();
      [[maybe_unused]] volatile float result = multiply(kCount);  // or it could be left out
      const auto took = Clock::now() - begin;
      if (took < least) {
        least = took;
        fastest = multiply;
      }
    }
  }
  return fastest;
}

// The fastest of several instructions, with operands from L1 or in registers. Latencies are up to 6
// cycles at one instruction per cycle, or 4 at two, or four of short vectors, so 8 to 24
// accumulators are needed, as many as there are registers for. (Zen 4: from 8 on, AVX-512 issues
// one instruction per cycle in every precision; AVX2 two, and 12 accumulators are 5 % faster than
// 8.)
template <typename... Instructions>
float FastestMultiplyAdds(std::int64_t count) {
  static const Multiplier multiply = [] {
    if constexpr (kLanes == 16) {
      return Fastest({
          MultiplyAddTile<Instructions, 4, 4, false>...,
          MultiplyAddTile<Instructions, 3, 8, true>...,
      });
    } else if constexpr (kRegisters == 32) {
      return Fastest({MultiplyAddTile<Instructions, 3, 8, true>...});
    } else {
      return Fastest({
          MultiplyAddTile<Instructions, 2, 4, true>...,
          MultiplyAddTile<Instructions, 2, 6, true>...,
      });
    }
  }();
  return multiply(count);
}

#if defined(DIFFMIC_SIMD_AMX)
// 2 x 2 accumulators as in a GEMM, with other operands in every slice: the clock falls with
// operands that change.
template <typename P>
float TileMultiplyAdds(std::int64_t count) {
  constexpr std::int64_t kSlices = kOperandBytes / (2 * kSliceWeights);
  constexpr std::int64_t kSliceProducts = 2 * P::kTileRows * kChunk * kSliceBytes /
                                          static_cast<std::int64_t>(sizeof(typename P::Weight));
  const std::byte* w = RandomOperands<typename P::Weight>();
  const std::byte* a = w + kSlices * kSliceWeights;
  alignas(64) float sums[4 * kTileBytes / 4];
  TileRegisters tiles(ConfigOf(P::kTileRows, false));
  ZeroSums<2>(tiles);
  for (; count > 0; count -= kSlices * kSliceProducts) {
    LinesAhead none{w, 0};
    AddSlices<P, 2>(tiles, a, kSlices * kTileBytes, kTileBytes, w, kSlices, none);
  }
  StoreSums<2>(tiles, reinterpret_cast<std::byte*>(sums), 2 * kTileBytes);
  return sums[0] + sums[4 * kTileBytes / 4 - 1];
}
#endif

// bfloat16 may also be widened for the float32 instructions; widening, once for all rows of a tile,
// is not counted.
template <typename P>
float MultiplyAddAll(std::int64_t count) {
#if defined(DIFFMIC_SIMD_AMX)
  if constexpr (P::kAmx) {
    return TileMultiplyAdds<P>(count);
  } else
#elif defined(DIFFMIC_SIMD_AVX512_BF16)
  if constexpr (std::is_same_v<P, VectorBFloat16>) {
    return FastestMultiplyAdds<BFloat16DotProduct, FusedMultiplyAdd>(count);
  } else
#endif
      if constexpr (P::kQuantised) {
#if defined(DIFFMIC_SIMD_AVX512) || defined(DIFFMIC_SIMD_AVX2)
    return FastestMultiplyAdds<ByteDotProduct, PairMultiplyAdd>(count);
#else
    return FastestMultiplyAdds<PairMultiplyAdd>(count);
#endif
  } else {
    return FastestMultiplyAdds<FusedMultiplyAdd>(count);
  }
}

}  // namespace
}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_PROBES_INC_H_
