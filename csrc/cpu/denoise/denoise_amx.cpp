// The kernels of `denoise` for AVX-512 and the tiles of AMX (Sapphire Rapids and later).
#if defined(__x86_64__) && !defined(DIFFMIC_NO_AMX)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_AVX512_BF16
#define DIFFMIC_SIMD_AMX
#include "cpu/denoise/denoise_kernels.inc.h"
#elif defined(__x86_64__)
#include "cpu/denoise/denoise_kernel_table.h"
constinit const diffmic::cpu::DenoiseKernelTable diffmic::cpu::amx::kDenoiseKernels = {};
#endif
