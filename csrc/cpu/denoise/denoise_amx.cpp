// The kernels of `denoise` for AVX-512 with the tiles of AMX (Sapphire Rapids and later); this file
// alone is compiled for them.
#if defined(__x86_64__) && !defined(DIFFMIC_NO_AMX)
#define DIFFMIC_SIMD_AVX512
#define DIFFMIC_SIMD_AVX512_BF16
#define DIFFMIC_SIMD_AMX
#define DIFFMIC_SIMD_NAME "amx"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* AmxDenoiseKernels() {
  const bool available = Avx512Bf16DenoiseKernels() != nullptr && HasAmx();
  return available ? &amx::kDenoiseKernels : nullptr;
}

}  // namespace diffmic::cpu
#else
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

const DenoiseKernels* AmxDenoiseKernels() { return nullptr; }

}  // namespace diffmic::cpu
#endif
