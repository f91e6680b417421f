// The kernels of `conditioning` for any processor.
#include "cpu/conditioning/conditioning_kernels.inc.h"
