// The kernels of `denoise` for AVX-512 with its dot products of bfloat16 and of bytes (Cooper Lake,
// Sapphire Rapids, Zen 4 and later); this file alone is compiled for it.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_AVX512_BF16
#define DIFFMIC_SIMD_NAME "avx512_bf16"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx512Bf16DenoiseKernels() {
  const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vnni") &&
                         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
  return available ? &avx512_bf16::kDenoiseKernels : nullptr;
}

}  // namespace diffmic::cpu
#else
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx512Bf16DenoiseKernels() { return nullptr; }

}  // namespace diffmic::cpu
#endif
