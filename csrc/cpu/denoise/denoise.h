// The reverse chain on the CPU. The definition is diffmic_fast/reference/denoise.py; the numbers
// are its own up to the order of float32 sums (and the roundings of bfloat16 and int8).
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_weights.h"
#include "include/denoise_call.h"

namespace diffmic::cpu {

// Rows that go through the layers together, which bounds the memory: one block of up to
// kLargestBlock rows, or more blocks of up to kBlockRows.
inline constexpr std::int64_t kBlockRows = 192;
inline constexpr std::int64_t kLargestBlock = 256;

// How a call is served; nothing of it changes a result but the kernels' instruction set.
struct DenoiseOptions {
  const DenoiseKernels* kernels = nullptr;
  int threads = 1;
  WeightCache* cache = nullptr;    // where the model's packed weights are kept, if they are
  std::int64_t* sweeps = nullptr;  // counts the evaluations of all blocks
  // Called from the caller's thread every tenth of a second with the steps done and those in all
  // (over all blocks of rows); false stops the chain.
  std::function<bool(std::int64_t, std::int64_t)> watch;
};

// False if `watch` stopped it: out then holds nothing of use. Memory beyond the arguments: blocks
// of up to 256 rows of activations, twice, and the packed hidden weights.
bool Denoise(const DenoiseCall& call, const DenoiseOptions& options);

// The same by windows of several steps; called by Denoise.
bool DenoiseWindows(const DenoiseCall& call, const DenoiseOptions& options);

// The kernels of that name ("auto": the widest that this processor has, and no emulation) for a
// precision, or NULL.
const DenoiseKernels* FindDenoiseKernels(const std::string& name, Precision precision);

// The names that FindDenoiseKernels knows and can serve here.
std::vector<std::string> DenoiseKernelNames();

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_H_
