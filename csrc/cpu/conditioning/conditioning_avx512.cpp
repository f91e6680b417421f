// The kernels of `conditioning` for AVX-512.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#include "cpu/conditioning/conditioning_kernels.inc.h"
#endif
