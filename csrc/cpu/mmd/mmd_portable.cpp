#define DIFFMIC_MMD_NAMESPACE portable
#define DIFFMIC_MMD_BYTES 16
#include "cpu/mmd/mmd_kernel.h"
