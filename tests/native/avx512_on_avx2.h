// AVX-512 intrinsics on processors with AVX2, for tests of the AVX-512 kernels: SIMDe (Debian's
// libsimde-dev 0.7.4), with replacements for what it lacks or computes differently from the
// hardware. Slow.
//
//   g++ -Og -mavx2 -mfma -fno-tree-sra -include avx512_on_avx2.h -c denoise_avx512.cpp
//
// Without -fno-tree-sra GCC 12 fails with an internal error in conditioning_avx512.cpp.
//
// Where DIFFMIC_AVX512_EMULATED is defined, kernels use intrinsics instead of inline assembly with
// 512-bit registers. The compiler rejects intrinsics that SIMDe does not alias, since -mavx512f is
// missing. tests/native/operations.cpp compares every operation of simd.h with the hardware bit for
// bit, in the default rounding mode.
#ifndef DIFFMIC_TESTS_NATIVE_AVX512_ON_AVX2_H_
#define DIFFMIC_TESTS_NATIVE_AVX512_ON_AVX2_H_

#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "avx512_on_avx2.h is for -mavx2 -mfma, without AVX-512"
#endif

#define DIFFMIC_AVX512_EMULATED 1
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace avx512_on_avx2 {

// The elements of a vector V, which is not a template argument: it would lose its alignment there.
template <typename T>
struct Elements {
  T at[64 / sizeof(T)] = {};

  template <typename V>
  static Elements Of(const V& vector) {
    Elements elements;
    static_assert(sizeof elements == sizeof vector);
    std::memcpy(&elements, &vector, sizeof elements);
    return elements;
  }
};

inline simde__m512 MaskedLoad(unsigned mask, const float* p) {
  float elements[16] = {};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) elements[i] = p[i];
  }
  return simde_mm512_loadu_ps(elements);
}

inline void MaskedStore(float* p, unsigned mask, simde__m512 a) {
  float elements[16];
  simde_mm512_storeu_ps(elements, a);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) p[i] = elements[i];
  }
}

// Rounded to nearest even; out of range it is INT32_MIN.
inline simde__m512i ToInt32(simde__m512 a) {
  float elements[16];
  std::int32_t integers[16];
  simde_mm512_storeu_ps(elements, a);
  for (int i = 0; i < 16; ++i) integers[i] = _mm_cvtss_si32(_mm_set_ss(elements[i]));
  return simde_mm512_loadu_si512(integers);
}

inline __m256i ToInt16(simde__m512i a) {
  std::int32_t integers[16];
  std::int16_t shorts[16];
  simde_mm512_storeu_si512(integers, a);
  for (int i = 0; i < 16; ++i) shorts[i] = static_cast<std::int16_t>(integers[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(shorts));
}

inline bool IsNan(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// Denormals are zero of their sign.
inline float Flush(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return (bits & 0x7F800000u) == 0 ? std::bit_cast<float>(bits & 0x80000000u) : x;
}

// a * b + c as VDPBF16PS computes it: denormal operands and results are zero, regardless of MXCSR.
// NaN is the first one of a, b, c, made quiet, or the default NaN of an invalid operation.
inline float MultiplyAdd(float a, float b, float c) {
  for (const float operand : {a, b, c}) {
    if (IsNan(operand)) {
      return std::bit_cast<float>(std::bit_cast<std::uint32_t>(operand) | 0x00400000u);
    }
  }
  const float result = std::fma(a, b, c);
  if (IsNan(result)) return std::bit_cast<float>(0xFFC00000u);
  if (std::abs(result) > 0x1p-126f || result == 0.0f) return result;
  // Tiny results are those below 2^-126 when rounded as if the exponent had no lower bound. Neither
  // factor is so large here that scaling overflows.
  const float scaled = std::fma(a * 0x1p64f, b, c * 0x1p64f);
  return std::abs(scaled) < 0x1p-62f ? std::copysign(0.0f, result) : result;
}

// sum + odd product, rounded, + even product, rounded. SIMDe's neither fuses nor flushes.
template <typename Pairs>
simde__m512 DotBFloat16(simde__m512 sum, const Pairs& a, const Pairs& b) {
  float sums[16];
  simde_mm512_storeu_ps(sums, sum);
  const auto x = Elements<std::uint32_t>::Of(a), y = Elements<std::uint32_t>::Of(b);
  const auto high = [](std::uint32_t pair) {
    return Flush(std::bit_cast<float>(pair & 0xFFFF0000u));
  };
  for (int i = 0; i < 16; ++i) {
    const float odd = MultiplyAdd(high(x.at[i]), high(y.at[i]), Flush(sums[i]));
    sums[i] = MultiplyAdd(high(x.at[i] << 16), high(y.at[i] << 16), odd);
  }
  return simde_mm512_loadu_ps(sums);
}

}  // namespace avx512_on_avx2

#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16
#define _mm512_maskz_loadu_ps(mask, p) avx512_on_avx2::MaskedLoad(mask, p)
#define _mm512_mask_storeu_ps(p, mask, a) avx512_on_avx2::MaskedStore(p, mask, a)
#define _mm512_cvtps_epi32(a) avx512_on_avx2::ToInt32(a)
#define _mm512_cvtepi32_epi16(a) avx512_on_avx2::ToInt16(a)
#define _mm512_dpbf16_ps(sum, a, b) avx512_on_avx2::DotBFloat16(sum, a, b)
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)  // 0.7.4's alias takes four arguments

// Emulated instruction sets are available with AVX2. A macro is not expanded inside itself.
#define __builtin_cpu_supports(feature) \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))

#endif  // DIFFMIC_TESTS_NATIVE_AVX512_ON_AVX2_H_
