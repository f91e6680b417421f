#define DIFFMIC_MMD_NAMESPACE avx2
#define DIFFMIC_MMD_BYTES 32
#include "cpu/mmd/mmd_kernel.h"
