// Replaces CUDA's header: conversions of float16, rounding to nearest even.
#ifndef DIFFMIC_EMULATOR_CUDA_FP16_H_
#define DIFFMIC_EMULATOR_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};
struct __half {
  std::uint16_t bits;
  __half() = default;
  constexpr __half(__half_raw raw) : bits(raw.x) {}
  operator __half_raw() const { return {bits}; }
};
struct alignas(4) __half2 {
  __half x, y;
};

EMULATED __half __float2half_rn(float value) {
  return __half_raw{std::bit_cast<std::uint16_t>(static_cast<_Float16>(value))};
}
EMULATED __half __float2half(float value) { return __float2half_rn(value); }
EMULATED float __half2float(__half value) {
  return static_cast<float>(std::bit_cast<_Float16>(value.bits));
}
EMULATED __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}

#endif  // DIFFMIC_EMULATOR_CUDA_FP16_H_
