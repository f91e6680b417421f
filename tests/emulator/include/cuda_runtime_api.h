#ifndef DIFFMIC_EMULATOR_CUDA_RUNTIME_API_H_
#define DIFFMIC_EMULATOR_CUDA_RUNTIME_API_H_
#include "cuda_runtime.h"
#endif
