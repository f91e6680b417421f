// The kernels of `denoise` for AVX-512.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#include "cpu/denoise/denoise_kernels.inc.h"
#endif
