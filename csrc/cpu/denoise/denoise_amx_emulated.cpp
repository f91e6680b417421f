// The kernels of denoise_amx.cpp with the tile instructions emulated on AVX2: the same bits,
// slower.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#define DIFFMIC_SIMD_AMX
#define DIFFMIC_SIMD_AMX_EMULATED
#include "cpu/denoise/denoise_kernels.inc.h"
#endif
