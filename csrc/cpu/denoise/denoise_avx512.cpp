// The kernels of `denoise` for AVX-512; this file alone is compiled for it.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_NAME "avx512"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx512DenoiseKernels() {
  const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("fma");
  return available ? &avx512::kDenoiseKernels : nullptr;
}

}  // namespace diffmic::cpu
#else
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx512DenoiseKernels() { return nullptr; }

}  // namespace diffmic::cpu
#endif
