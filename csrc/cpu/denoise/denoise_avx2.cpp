// The kernels of `denoise` for AVX2 with fused multiply-add; this file alone is compiled for them.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#define DIFFMIC_SIMD_NAME "avx2"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx2DenoiseKernels() {
  const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return available ? &avx2::kDenoiseKernels : nullptr;
}

}  // namespace diffmic::cpu
#else
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

const DenoiseKernels* Avx2DenoiseKernels() { return nullptr; }

}  // namespace diffmic::cpu
#endif
