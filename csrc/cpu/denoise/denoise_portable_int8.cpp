// The int8 kernels of `denoise` for any processor. With float32's multiply-adds fused, where the
// instruction set has none: results are bitwise identical to all other instruction sets.
#define DIFFMIC_SIMD_FUSED
#define DIFFMIC_SIMD_NAME "portable"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* PortableInt8DenoiseKernels() { return &portable_fused::kDenoiseKernels; }

}  // namespace diffmic::cpu
