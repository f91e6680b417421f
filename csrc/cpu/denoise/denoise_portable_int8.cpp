// The int8 kernels of `denoise` for any processor. Multiply-adds of float32 are fused even where
// the instruction set has none, so that results are bitwise identical to all other instruction
// sets.
#define DIFFMIC_SIMD_FUSED
#include "cpu/denoise/denoise_kernels.inc.h"
