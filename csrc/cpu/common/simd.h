// Vectors of float32 and int32 in the widest registers of an instruction set, under the same names
// for each: kernels are written once against this file and compiled once per instruction set.
//
// A translation unit defines its instruction set before it includes this file: DIFFMIC_SIMD_AVX512
// (with DIFFMIC_SIMD_AVX512_BF16 if it also has VDPBF16PS and VPDPBUSD), DIFFMIC_SIMD_AVX2, or
// neither: vectors of 16 bytes, NEON on Arm and SSE2 on x86. DIFFMIC_SIMD_AMX adds the tiles of AMX
// to AVX-512, or with DIFFMIC_SIMD_AMX_EMULATED their emulation to AVX2. All of it lives in a
// namespace named after the instruction set, so that the linker never merges functions compiled
// for different ones. Multiply-adds are fused where the instruction set has them, and only where
// Fma is written.
#ifndef DIFFMIC_CPU_COMMON_SIMD_H_
#define DIFFMIC_CPU_COMMON_SIMD_H_

#include <cfloat>
#include <cstdint>
#include <cstring>

#if defined(DIFFMIC_SIMD_AVX512) || defined(DIFFMIC_SIMD_AVX2)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(DIFFMIC_SIMD_AMX_EMULATED)
#define DIFFMIC_SIMD amx_emulated
#elif defined(DIFFMIC_SIMD_AMX)
#define DIFFMIC_SIMD amx
#elif defined(DIFFMIC_SIMD_FUSED)
#define DIFFMIC_SIMD portable_fused
#elif defined(DIFFMIC_SIMD_AVX512_BF16)
#define DIFFMIC_SIMD avx512_bf16
#elif defined(DIFFMIC_SIMD_AVX512)
#define DIFFMIC_SIMD avx512
#elif defined(DIFFMIC_SIMD_AVX2)
#define DIFFMIC_SIMD avx2
#else
#define DIFFMIC_SIMD portable
#endif

namespace diffmic::cpu::DIFFMIC_SIMD {

// What a vector is reduced to before the last two additions of Sum.
typedef float Quad __attribute__((vector_size(16)));

// ---- operations whose instructions differ between the instruction sets
//
//   Vec, Ints       kLanes float32; kLanes int32, or pairs of 16 bits
//   LoadPart        the first `count` lanes; 0 in the others
//   Max(a, b)       b where either is NaN
//   Round           to nearest even; |a| < 2^22
//   ToInts          integers within +-2^22
//   LoadBytePairs   kLanes pairs of int8, widened to 16 bits
//   StoreBFloat16   the upper halves of values from RoundToBFloat16
//   AddProduct      sum += a * b, rounded once
//   AddProducts     sum += a_even b_even + a_odd b_odd for pairs of 16 bits
//
// AddProduct and AddProducts are inline assembly that updates the accumulator in place. Left to
// itself, GCC copies the accumulators of a loop between registers, one move for every two
// multiply-adds, and hoists all integer products of an unrolled loop until registers run out.

#if defined(DIFFMIC_SIMD_AVX512)

struct Vec {
  __m512 v;
};
struct Ints {
  __m512i v;
};
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;

inline Vec Set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec LoadPart(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline void Store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void StorePart(float* p, Vec a, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), a.v);
}
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec Round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Quad Fold(Vec a) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(a.v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline Ints SetInts(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints LoadInts(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void StoreInts(void* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints ToInts(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Ints LoadBytePairs(const std::int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
#if defined(DIFFMIC_AVX512_EMULATED)  // tests/native/avx512_on_avx2.h: no such registers
inline void AddProduct(Vec a, Vec b, Vec& sum) { sum = Fma(a, b, sum); }
inline void AddProducts(Ints a, Ints b, Ints& sum) {
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v));
}
#else
inline void AddProduct(Vec a, Vec b, Vec& sum) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}
inline void AddProducts(Ints a, Ints b, Ints& sum) {
  __m512i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+v"(sum.v), "=&v"(products)
      : "v"(a.v), "v"(b.v));
}
#endif
#if defined(DIFFMIC_SIMD_AVX512_BF16)
// sum += the four products of uint8 in `a` and int8 in `b`, exact.
inline void AddByteProducts(Ints a, Ints b, Ints& sum) {
#if defined(DIFFMIC_AVX512_EMULATED)
  sum.v = _mm512_dpbusd_epi32(sum.v, a.v, b.v);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
#endif
}
#endif

#elif defined(DIFFMIC_SIMD_AVX2)

struct Vec {
  __m256 v;
};
struct Ints {
  __m256i v;
};
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;

inline __m256i PartMask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec Set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec LoadPart(const float* p, int count) { return {_mm256_maskload_ps(p, PartMask(count))}; }
inline void Store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void StorePart(float* p, Vec a, int count) { _mm256_maskstore_ps(p, PartMask(count), a.v); }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec Round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Quad Fold(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
}
inline Ints SetInts(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints LoadInts(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void StoreInts(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline Ints ToInts(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
inline Ints LoadBytePairs(const std::int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(a.v), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
inline void AddProduct(Vec a, Vec b, Vec& sum) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.v) : "x"(a.v), "x"(b.v));
}
inline void AddProducts(Ints a, Ints b, Ints& sum) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum.v), "=&x"(products)
      : "x"(a.v), "x"(b.v));
}

#else

typedef std::int32_t QuadInts __attribute__((vector_size(16)));
struct Vec {
  Quad v;
};
struct Ints {
  QuadInts v;
};
inline constexpr int kLanes = 4;
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

inline Vec Set(float x) { return {Quad{x, x, x, x}}; }
inline Vec Load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline Vec LoadPart(const float* p, int count) {
  float four[4] = {};
  std::memcpy(four, p, sizeof(float) * static_cast<std::size_t>(count));
  return Load(four);
}
inline void Store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline void StorePart(float* p, Vec a, int count) {
  std::memcpy(p, &a, sizeof(float) * static_cast<std::size_t>(count));
}
#if defined(__aarch64__)
inline Vec Fma(Vec a, Vec b, Vec c) {
  return {(Quad)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
}
#elif defined(DIFFMIC_SIMD_FUSED)
// a b + c rounded once: the product is exact in double, and the sum is rounded to odd there, so
// that rounding it again to float32 is correct (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008).
static_assert(FLT_EVAL_METHOD == 0, "float32 arithmetic must round to float32");
inline Vec Fma(Vec a, Vec b, Vec c) {
  typedef double Doubles __attribute__((vector_size(32)));
  typedef std::int64_t LongInts __attribute__((vector_size(32)));
  const Doubles product =
      __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles);
  const Doubles term = __builtin_convertvector(c.v, Doubles);
  Doubles sum = product + term;
  const Doubles virtual_term = sum - product;
  const Doubles error = (product - (sum - virtual_term)) + (term - virtual_term);
  LongInts bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const LongInts inexact = (error > 0.0) | (error < 0.0);
  const LongInts even = (bits & 1) - 1;
  const LongInts toward_zero = (error > 0.0) ^ (sum > 0.0);  // -1, else 0
  bits += inexact & even & (toward_zero | 1);
  std::memcpy(&sum, &bits, sizeof sum);
  return {__builtin_convertvector(sum, Quad)};
}
#else
inline Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
#endif
inline Vec Max(Vec a, Vec b) {
  const QuadInts larger = a.v > b.v;
  return {(Quad)((larger & (QuadInts)a.v) | (~larger & (QuadInts)b.v))};
}
// Adding 1.5 * 2^23 leaves no fraction bits.
inline Vec Round(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }
inline Quad Fold(Vec a) { return a.v; }
inline Ints SetInts(std::int32_t x) { return {QuadInts{x, x, x, x}}; }
inline Ints LoadInts(const void* p) {
  Ints a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void StoreInts(void* p, Ints a) { std::memcpy(p, &a, sizeof a); }
inline Ints ToInts(Vec a) {
  const Quad magic = Set(12582912.0f).v;
  return {(QuadInts)(a.v + magic) - (QuadInts)magic};
}
inline Ints LoadBytePairs(const std::int8_t* p) {
#if defined(__ARM_NEON)
  return {(QuadInts)vmovl_s8(vld1_s8(p))};
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {(QuadInts)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8)};
#else
  const std::int16_t pairs[8] = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  return LoadInts(pairs);
#endif
}
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  const auto bits = (QuadInts)a.v;
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<std::uint16_t>(static_cast<std::uint32_t>(bits[i]) >> 16);
  }
}
inline void AddProduct(Vec a, Vec b, Vec& sum) { sum = Fma(a, b, sum); }
inline void AddProducts(Ints a, Ints b, Ints& sum) {
#if defined(__SSE2__)
  sum.v += (QuadInts)_mm_madd_epi16((__m128i)a.v, (__m128i)b.v);
  asm("" : "+x"(sum.v));  // keeps the order, or GCC runs out of registers
#else
  sum.v += ((a.v << 16) >> 16) * ((b.v << 16) >> 16) + (a.v >> 16) * (b.v >> 16);
#endif
}

#endif

// ---- operations common to all instruction sets

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Words __attribute__((vector_size(4 * kLanes)));
inline constexpr auto kUpperHalf = static_cast<std::int32_t>(0xFFFF0000u);

inline Words Bits(Vec a) { return (Words)a.v; }
inline Vec FromBits(Words bits) { return {(decltype(Vec::v))bits}; }

inline Vec Zero() { return Vec{}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec NegativeAbs(Vec a) { return FromBits(Bits(a) | INT32_MIN); }
// 0 where `a` is NaN.
inline Vec ZeroNan(Vec a) { return FromBits((Words)(a.v == a.v) & Bits(a)); }
inline Vec ToFloat(Vec a) { return a; }
inline Vec ToFloat(Ints a) { return {__builtin_convertvector((Words)a.v, Floats)}; }
// 2^n for integers n in [-126, 127].
inline Vec PowerOfTwo(Vec n) { return FromBits(((Words)ToInts(n).v + 127) << 23); }
// Four bytes in all lanes.
inline Ints SetFourBytes(const void* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return SetInts(word);
}

// Pairs of bfloat16, the even element first in memory (little-endian): one of each pair as float32.
inline Vec Even(Ints pairs) { return FromBits((Words)pairs.v << 16); }
inline Vec Odd(Ints pairs) { return FromBits((Words)pairs.v & kUpperHalf); }
// Rounded to bfloat16, to nearest even, and widened again. NaN becomes a quiet NaN: the bits that
// tell a signalling NaN from infinity may be those that are cut off.
inline Vec RoundToBFloat16(Vec a) {
  const Words bits = Bits(a), ordered = (Words)(a.v == a.v);
  const Words rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) & kUpperHalf;
  return FromBits((ordered & rounded) | (~ordered & (bits | 0x00400000)));
}

// Prefetches a cache line into L1 or L2. Always inlined: GCC drops a prefetch from a function of
// its own, as one without effect.
[[gnu::always_inline]] inline void Prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] inline void PrefetchToL2(const void* p) { __builtin_prefetch(p, 0, 2); }

inline float Sum(Vec a) {
  const Quad four = Fold(a);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// exp(x) for x <= 0, within 1.5 ULP down to exp(-87) = 1.6e-38, which smaller arguments return too.
// Cody and Waite's reduction, then the Taylor series to degree 7 on |r| <= ln(2) / 2, where the
// first omitted term is 7e-9 of the sum.
inline Vec ExpOfNegative(Vec x) {
  x = Max(Set(-87.0f), x);
  const Vec n = Round(x * Set(1.44269504f));
  Vec r = Fma(n, Set(-0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.0f / 5040.0f);
  p = Fma(p, r, Set(1.0f / 720.0f));
  p = Fma(p, r, Set(1.0f / 120.0f));
  p = Fma(p, r, Set(1.0f / 24.0f));
  p = Fma(p, r, Set(1.0f / 6.0f));
  p = Fma(p, r, Set(0.5f));
  p = Fma(p, r, Set(1.0f));
  p = Fma(p, r, Set(1.0f));
  return p * PowerOfTwo(n);
}

// ln(1 + u) for 0 <= u <= 1: 2 artanh(s), s = u / (u + 2) <= 1/3, as a series to s^17.
inline Vec Log1p(Vec u) {
  const Vec s = u / (u + Set(2.0f));
  const Vec square = s * s;
  Vec p = Set(1.0f / 17.0f);
  p = Fma(p, square, Set(1.0f / 15.0f));
  p = Fma(p, square, Set(1.0f / 13.0f));
  p = Fma(p, square, Set(1.0f / 11.0f));
  p = Fma(p, square, Set(1.0f / 9.0f));
  p = Fma(p, square, Set(1.0f / 7.0f));
  p = Fma(p, square, Set(1.0f / 5.0f));
  p = Fma(p, square, Set(1.0f / 3.0f));
  const Vec twice = s + s;
  return Fma(p * square, twice, twice);
}

// softplus(x) = ln(1 + exp(x)) = max(x, 0) + ln(1 + exp(-|x|)), relative error below 4e-7 for
// x >= -87. NaN propagates.
inline Vec Softplus(Vec x) { return Max(Zero(), x) + Log1p(ExpOfNegative(NegativeAbs(x))); }

}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_COMMON_SIMD_H_
