// The kernels of `denoise` for AVX2 and FMA.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#include "cpu/denoise/denoise_kernels.inc.h"
#endif
