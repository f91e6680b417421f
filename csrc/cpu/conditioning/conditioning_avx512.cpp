// The kernels of `conditioning` for AVX-512; this file alone is compiled for it.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_NAME "avx512"
#include "cpu/conditioning/conditioning_kernels.inc.h"

namespace diffmic::cpu::conditioning {

const Kernels* Avx512Kernels() {
  const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("fma");
  return available ? &avx512::kConditioningKernels : nullptr;
}

}  // namespace diffmic::cpu::conditioning
#else
#include "cpu/conditioning/conditioning_kernel_table.h"

namespace diffmic::cpu::conditioning {

const Kernels* Avx512Kernels() { return nullptr; }

}  // namespace diffmic::cpu::conditioning
#endif
