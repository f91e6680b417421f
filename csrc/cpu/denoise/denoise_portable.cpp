// The kernels of `denoise` for any processor.
#include "cpu/denoise/denoise_kernels.inc.h"
