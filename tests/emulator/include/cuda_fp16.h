// Stands in for CUDA's header of this name: conversions of float16, to nearest even.
#ifndef DIFFMIC_EMULATOR_CUDA_FP16_H_
#define DIFFMIC_EMULATOR_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};

EMULATED __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
EMULATED __half __float2half(float value) { return __float2half_rn(value); }
EMULATED float __half2float(__half value) { return static_cast<float>(value.value); }
EMULATED __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}

#endif  // DIFFMIC_EMULATOR_CUDA_FP16_H_
