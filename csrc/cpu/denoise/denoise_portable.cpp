// The kernels of `denoise` for any processor.
#define DIFFMIC_SIMD_NAME "portable"
#include "cpu/denoise/denoise_kernels.inc.h"

namespace diffmic::cpu {

const DenoiseKernels* PortableDenoiseKernels() { return &portable::kDenoiseKernels; }

}  // namespace diffmic::cpu
