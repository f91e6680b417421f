// The kernels of `conditioning` for AVX2 with fused multiply-add; this file alone is compiled for
// them.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#define DIFFMIC_SIMD_NAME "avx2"
#include "cpu/conditioning/conditioning_kernels.inc.h"

namespace diffmic::cpu::conditioning {

const Kernels* Avx2Kernels() {
  const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return available ? &avx2::kConditioningKernels : nullptr;
}

}  // namespace diffmic::cpu::conditioning
#else
#include "cpu/conditioning/conditioning_kernel_table.h"

namespace diffmic::cpu::conditioning {

const Kernels* Avx2Kernels() { return nullptr; }

}  // namespace diffmic::cpu::conditioning
#endif
