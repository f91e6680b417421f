// Replaces CUDA's header: conversions of bfloat16, rounding to nearest even.
#ifndef DIFFMIC_EMULATOR_CUDA_BF16_H_
#define DIFFMIC_EMULATOR_CUDA_BF16_H_

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  constexpr __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  operator __nv_bfloat16_raw() const { return {bits}; }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

EMULATED __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return __nv_bfloat16_raw{0x7FFF};
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return __nv_bfloat16_raw{static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
EMULATED __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
EMULATED float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}
EMULATED __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
// A product of two bfloat16 is exact in float.
EMULATED __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(__bfloat162float(a) * __bfloat162float(b));
}
EMULATED __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__hmul(a.x, b.x), __hmul(a.y, b.y)};
}

#endif  // DIFFMIC_EMULATOR_CUDA_BF16_H_
