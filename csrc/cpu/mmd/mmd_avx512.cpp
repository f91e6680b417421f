#define DIFFMIC_MMD_NAMESPACE avx512
#define DIFFMIC_MMD_BYTES 64
#include "cpu/mmd/mmd_kernel.h"
