// How a call of `denoise` runs on the CPU. Only the instruction set of the kernels changes a
// result.
#ifndef DIFFMIC_CPU_DENOISE_DENOISE_OPTIONS_H_
#define DIFFMIC_CPU_DENOISE_DENOISE_OPTIONS_H_

#include <cstdint>
#include <functional>

#include "cpu/denoise/denoise_kernel_table.h"
#include "cpu/denoise/denoise_weights.h"

namespace diffmic::cpu {

// Rows of a sweep, which bound the memory: one block of at most kLargestBlock rows, or several
// blocks of at most kBlockRows.
inline constexpr std::int64_t kBlockRows = 192;
inline constexpr std::int64_t kLargestBlock = 256;

struct DenoiseOptions {
  const DenoiseKernels* kernels = nullptr;
  int threads = 1;
  WeightCache* cache = nullptr;    // of the model's packed weights; null: packed for this call
  std::int64_t* sweeps = nullptr;  // incremented by the number of sweeps
  // Called on the caller's thread every 0.1 s with the steps done and the steps in total, over all
  // blocks of rows; false stops the chain.
  std::function<bool(std::int64_t, std::int64_t)> watch;
};

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_DENOISE_DENOISE_OPTIONS_H_
