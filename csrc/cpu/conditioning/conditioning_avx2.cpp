// The kernels of `conditioning` for AVX2 and FMA.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#include "cpu/conditioning/conditioning_kernels.inc.h"
#endif
