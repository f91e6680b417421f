// Stands in for CUDA's header of this name: conversions of bfloat16, to nearest even.
#ifndef DIFFMIC_EMULATOR_CUDA_BF16_H_
#define DIFFMIC_EMULATOR_CUDA_BF16_H_

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

EMULATED __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
EMULATED __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
EMULATED float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}
EMULATED __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}

#endif  // DIFFMIC_EMULATOR_CUDA_BF16_H_
