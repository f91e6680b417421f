// The kernels of `conditioning` for any processor.
#define DIFFMIC_SIMD_NAME "portable"
#include "cpu/conditioning/conditioning_kernels.inc.h"

namespace diffmic::cpu::conditioning {

const Kernels* PortableKernels() { return &portable::kConditioningKernels; }

}  // namespace diffmic::cpu::conditioning
