// The reverse chain on the CPU. The definition is diffmic_fast/reference/denoise.py; results differ
// from it by the order of float32 sums, and by the roundings of bfloat16 and int8.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_H_

#include <string>
#include <vector>

#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_options.h"
#include "include/denoise_call.h"

namespace diffmic::cpu {

// Returns false if `watch` stopped the chain; `out` is then undefined. Memory beyond the arguments:
// activations of up to kLargestBlock rows, twice, and the packed hidden weights.
bool Denoise(const DenoiseCall& call, const DenoiseOptions& options);

// The same in windows of several steps (denoise_window.cpp); called by Denoise.
bool DenoiseWindows(const DenoiseCall& call, const DenoiseOptions& options);

// The kernels of an instruction set ("auto": the first of DenoiseKernelNames) for a precision, or
// null.
const DenoiseKernels* FindDenoiseKernels(const std::string& name, Precision precision);

// The instruction sets with kernels that this processor supports, in order of preference.
std::vector<std::string> DenoiseKernelNames();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_H_
