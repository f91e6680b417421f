// One vector of float32 in the widest registers of an instruction set, behind the same names in
// each: kernels are written once against this file and compiled once for each set.
//
// A translation unit names its set before it includes this: DIFFMIC_SIMD_AVX512 (with
// DIFFMIC_SIMD_AVX512_BF16 where it also has the dot products of bfloat16 and of bytes),
// DIFFMIC_SIMD_AVX2, or none (then vectors of 16 bytes: NEON on Arm, SSE2 on x86, whatever the
// compiler makes elsewhere). DIFFMIC_SIMD_AMX says that the tiles of AMX are used beside AVX-512,
// or with DIFFMIC_SIMD_AMX_EMULATED their emulation beside AVX2. Everything lives in a namespace of
// that set's name, so that the linker never takes one set's function for another's. Multiplication
// and addition are fused where the set has it, and only where Fma is written.
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

// Four floats: what a vector folds to before its last two additions.
#if defined(DIFFMIC_SIMD_AVX512) || defined(DIFFMIC_SIMD_AVX2)
using Quad = __m128;
inline void StoreQuad(float* p, Quad q) { _mm_storeu_ps(p, q); }
#else
typedef float Quad __attribute__((vector_size(16)));
inline Quad LoadQuad(const float* p) {
  Quad q;
  std::memcpy(&q, p, sizeof q);
  return q;
}
inline void StoreQuad(float* p, Quad q) { std::memcpy(p, &q, sizeof q); }
#endif

#if defined(DIFFMIC_SIMD_AVX512)

struct Vec {
  __m512 v;
};
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;

inline Vec Zero() { return {_mm512_setzero_ps()}; }
inline Vec Set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec LoadPart(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline void Store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void StorePart(float* p, Vec a, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), a.v);
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger one; b where either is not a number.
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec NegativeAbs(Vec a) {
  return {
      _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline Vec ZeroNan(Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)};
}
inline Vec Round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n of whole n in [-126, 127].
inline Vec PowerOfTwo(Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Quad Fold(Vec a) {
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(a.v),
                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
// bfloat16 pairs in memory: the even elements, or the odd ones, as float32.
struct Pairs {
  __m512i v;
};
inline Pairs LoadPairs(const std::uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Vec Even(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Vec Odd(Pairs a) {
  return {
      _mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
// Rounded to bfloat16, to nearest even, and widened again; not-a-numbers stay so, made quiet, since
// what tells a signalling one from infinity may be in the bits cut off.
inline Vec RoundToBFloat16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(cut, nan, quiet))};
}
// What RoundToBFloat16 gave, as bfloat16.
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
// kLanes integers of 32 bits, or pairs of 16.
struct Ints {
  __m512i v;
};
inline Ints ZeroInts() { return {_mm512_setzero_si512()}; }
inline Ints LoadInts(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Vec ToFloat(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Of whole numbers within +-2^22.
inline Ints ToInts(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline void StoreInts(std::int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
// kLanes pairs of bytes, as pairs of 16 bits.
inline Ints LoadBytePairs(const std::int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// One pair of 16 bits in all lanes.
inline Ints SetPair(const std::int16_t* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
// sum += a * b, rounded once; and sum += a_even b_even + a_odd b_odd, for each pair. In the sum's
// own register: left to itself GCC moves the sums of a loop from one register to the other, a move
// for every two multiply-adds, and does all of an unrolled loop's products of whole numbers first,
// for which it has no registers left.
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

#elif defined(DIFFMIC_SIMD_AVX2)

struct Vec {
  __m256 v;
};
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;

inline __m256i PartMask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec Zero() { return {_mm256_setzero_ps()}; }
inline Vec Set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec LoadPart(const float* p, int count) { return {_mm256_maskload_ps(p, PartMask(count))}; }
inline void Store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void StorePart(float* p, Vec a, int count) { _mm256_maskstore_ps(p, PartMask(count), a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec NegativeAbs(Vec a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline Vec ZeroNan(Vec a) { return {_mm256_and_ps(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q), a.v)}; }
inline Vec Round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec PowerOfTwo(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline Quad Fold(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
}
struct Pairs {
  __m256i v;
};
inline Pairs LoadPairs(const std::uint16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Vec Even(Pairs a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
inline Vec Odd(Pairs a) {
  return {
      _mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
inline Vec RoundToBFloat16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  return {_mm256_blendv_ps(_mm256_castsi256_ps(cut), _mm256_castsi256_ps(quiet), nan)};
}
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(a.v), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
struct Ints {
  __m256i v;
};
inline Ints ZeroInts() { return {_mm256_setzero_si256()}; }
inline Ints LoadInts(const std::int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Vec ToFloat(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Ints ToInts(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
inline void StoreInts(std::int32_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
inline Ints LoadBytePairs(const std::int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints SetPair(const std::int16_t* p) {
  std::int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair)};
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

struct Vec {
  Quad v;
};
typedef std::int32_t Integers __attribute__((vector_size(16)));
inline constexpr int kLanes = 4;
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

inline Integers Bits(Quad a) {
  Integers bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline Quad FromBits(Integers bits) {
  Quad a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline Quad Select(Integers mask, Quad yes, Quad no) {
  return FromBits((mask & Bits(yes)) | (~mask & Bits(no)));
}
inline Vec Zero() { return {Quad{0, 0, 0, 0}}; }
inline Vec Set(float x) { return {Quad{x, x, x, x}}; }
inline Vec Load(const float* p) { return {LoadQuad(p)}; }
inline Vec LoadPart(const float* p, int count) {
  float four[4] = {};
  std::memcpy(four, p, sizeof(float) * static_cast<std::size_t>(count));
  return Load(four);
}
inline void Store(float* p, Vec a) { StoreQuad(p, a.v); }
inline void StorePart(float* p, Vec a, int count) {
  std::memcpy(p, &a, sizeof(float) * static_cast<std::size_t>(count));
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
#if !defined(__aarch64__) && defined(DIFFMIC_SIMD_FUSED)
// a b + c rounded once: the product is exact in double, and the sum is rounded to odd there, so
// that rounding it again to float32 is correct (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008).
static_assert(FLT_EVAL_METHOD == 0, "float32 arithmetic must round to float32");
inline Vec Fma(Vec a, Vec b, Vec c) {
  typedef double Doubles __attribute__((vector_size(32)));
  typedef std::int64_t Words __attribute__((vector_size(32)));
  const Doubles product =
      __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles);
  const Doubles term = __builtin_convertvector(c.v, Doubles);
  Doubles sum = product + term;
  const Doubles virtual_term = sum - product;
  const Doubles error = (product - (sum - virtual_term)) + (term - virtual_term);
  Words bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const Words inexact = (error > 0.0) | (error < 0.0);
  const Words even = (bits & 1) - 1;
  const Words toward_zero = (error > 0.0) ^ (sum > 0.0);  // -1, else 0
  bits += inexact & even & (toward_zero | 1);
  std::memcpy(&sum, &bits, sizeof sum);
  return {__builtin_convertvector(sum, Quad)};
}
#else
inline Vec Fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return {(Quad)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
#endif
inline Vec Max(Vec a, Vec b) { return {Select(a.v > b.v, a.v, b.v)}; }
inline Vec NegativeAbs(Vec a) { return {FromBits(Bits(a.v) | INT32_MIN)}; }
inline Vec ZeroNan(Vec a) { return {FromBits((a.v == a.v) & Bits(a.v))}; }
// Of |a| < 2^22: adding 1.5 * 2^23 leaves no place for a fraction.
inline Vec Round(Vec a) {
  const Vec magic = Set(12582912.0f);
  return (a + magic) - magic;
}
inline Vec PowerOfTwo(Vec n) {
  const Vec magic = Set(12582912.0f);
  return {FromBits((Bits((n + magic).v) - Bits(magic.v) + 127) << 23)};
}
inline Quad Fold(Vec a) { return a.v; }
struct Pairs {
  Integers v;
};
inline Pairs LoadPairs(const std::uint16_t* p) {
  Pairs a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
// In memory the even element comes first: the low half of a word on a little-endian machine.
inline Vec Even(Pairs a) { return {FromBits(a.v << 16)}; }
inline Vec Odd(Pairs a) { return {FromBits(a.v & static_cast<std::int32_t>(0xFFFF0000u))}; }
inline Vec RoundToBFloat16(Vec a) {
  const Integers bits = Bits(a.v);
  const Integers up = bits + ((bits >> 16) & 1) + 0x7FFF;
  return {Select(a.v == a.v, FromBits(up & static_cast<std::int32_t>(0xFFFF0000u)),
                 FromBits(bits | 0x00400000))};
}
inline void StoreBFloat16(std::uint16_t* p, Vec a) {
  const Integers bits = Bits(a.v);
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<std::uint16_t>(static_cast<std::uint32_t>(bits[i]) >> 16);
  }
}
struct Ints {
  Integers v;
};
inline Ints ZeroInts() { return {Integers{0, 0, 0, 0}}; }
inline Ints LoadInts(const std::int32_t* p) {
  Ints a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline Vec ToFloat(Ints a) { return {__builtin_convertvector(a.v, Quad)}; }
inline Ints ToInts(Vec a) {
  const Vec magic = Set(12582912.0f);
  return {Bits((a + magic).v) - Bits(magic.v)};
}
inline void StoreInts(std::int32_t* p, Ints a) { std::memcpy(p, &a, sizeof a); }
inline Ints LoadBytePairs(const std::int8_t* p) {
#if defined(__ARM_NEON)
  return {(Integers)vmovl_s8(vld1_s8(p))};
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {(Integers)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8)};
#else
  Ints pairs;
  for (int i = 0; i < kLanes; ++i) {
    const auto low = static_cast<std::uint16_t>(static_cast<std::int16_t>(p[2 * i]));
    const auto high = static_cast<std::uint16_t>(static_cast<std::int16_t>(p[2 * i + 1]));
    pairs.v[i] = static_cast<std::int32_t>(low | static_cast<std::uint32_t>(high) << 16);
  }
  return pairs;
#endif
}
inline Ints SetPair(const std::int16_t* p) {
  const auto low = static_cast<std::uint16_t>(p[0]), high = static_cast<std::uint16_t>(p[1]);
  const auto pair = static_cast<std::int32_t>(low | static_cast<std::uint32_t>(high) << 16);
  return {Integers{pair, pair, pair, pair}};
}
inline void AddProduct(Vec a, Vec b, Vec& sum) { sum = Fma(a, b, sum); }
inline void AddProducts(Ints a, Ints b, Ints& sum) {
#if defined(__SSE2__)
  sum.v += (Integers)_mm_madd_epi16((__m128i)a.v, (__m128i)b.v);
  asm("" : "+x"(sum.v));  // one after the other, or GCC has no registers left
#else
  sum.v += ((a.v << 16) >> 16) * ((b.v << 16) >> 16) + (a.v >> 16) * (b.v >> 16);
#endif
}

#endif

// Fetches a cache line that will be read soon, into L1 or L2. Inlined always: gcc leaves a prefetch
// out of a function of its own, which has no effect that it knows of.
[[gnu::always_inline]] inline void Prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] inline void PrefetchToL2(const void* p) { __builtin_prefetch(p, 0, 2); }

inline float Sum(Vec a) {
  float four[4];
  StoreQuad(four, Fold(a));
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// exp(x) of x <= 0, within 1.5 units in the last place of float32 down to exp(-87); smaller results
// are given as exp(-87) = 1.6e-38. Cody and Waite's reduction, then Taylor's series to degree 7 on
// |r| <= ln(2) / 2, where the first term left out is 7e-9 of the sum.
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

// ln(1 + u) of 0 <= u <= 1: 2 artanh(s), s = u / (u + 2) <= 1/3, as a series to s^17.
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
// x >= -87. Not-a-number stays so.
inline Vec Softplus(Vec x) { return Max(Zero(), x) + Log1p(ExpOfNegative(NegativeAbs(x))); }

}  // namespace diffmic::cpu::DIFFMIC_SIMD

#endif  // DIFFMIC_CPU_COMMON_SIMD_H_
