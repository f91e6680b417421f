// The kernels of denoise_amx.cpp with the tile instructions emulated on AVX2: the same bits,
// slower.
#if defined(__x86_64__)
#define DIFFMIC_SIMD_AVX2
#define DIFFMIC_SIMD_AMX
#define DIFFMIC_SIMD_AMX_EMULATED
#define DIFFMIC_SIMD_NAME "amx_emulated"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* AmxEmulatedDenoiseKernels() {
  return Avx2DenoiseKernels() != nullptr ? &amx_emulated::kDenoiseKernels : nullptr;
}

}  // namespace diffmic::cpu
#else
#include "cpu/denoise/denoise_kernel_table.h"

namespace diffmic::cpu {

const DenoiseKernels* AmxEmulatedDenoiseKernels() { return nullptr; }

}  // namespace diffmic::cpu
#endif
