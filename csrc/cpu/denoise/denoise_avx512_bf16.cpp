// The kernels of `denoise` for AVX-512 with the dot products of bfloat16 and int8 (Cooper Lake,
// Sapphire Rapids, Zen 4 and later).
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_AVX512_BF16
#include "cpu/denoise/denoise_kernels.inc.h"
#endif
