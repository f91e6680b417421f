// Replaces CUDA's header: the conversion of float to e4m3, rounding to nearest even.
#ifndef DIFFMIC_EMULATOR_CUDA_FP8_H_
#define DIFFMIC_EMULATOR_CUDA_FP8_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

using __nv_fp8_storage_t = std::uint8_t;
enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

// Saturates to 448 in magnitude; NaN stays NaN.
EMULATED __nv_fp8_storage_t __nv_cvt_float_to_fp8(float value, __nv_saturation_t,
                                                  __nv_fp8_interpretation_t) {
  const auto sign = static_cast<std::uint8_t>(std::signbit(value) ? 0x80 : 0);
  if (std::isnan(value)) return sign | 0x7F;
  const float size = std::min(std::fabs(value), 448.0f);
  // Subnormals, below 2^-6, are multiples of 2^-9; other numbers have four significant bits.
  const int exponent = size < 0x1p-6f ? -5 : std::ilogb(size) + 1;
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(size, 4 - exponent)));
  // The implicit leading bit, and a carry of the rounding, add to the exponent.
  return static_cast<std::uint8_t>(sign | (((exponent + 5) << 3) + digits));
}

#endif  // DIFFMIC_EMULATOR_CUDA_FP8_H_
