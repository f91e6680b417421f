// What the driver of `conditioning` (conditioning.cpp) and its kernels (conditioning_kernels.inc.h,
// compiled once an instruction set) share.
#ifndef DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_
#define DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_

#include <cstdint>

#include "cpu/conditioning/conditioning.h"

namespace diffmic::cpu::conditioning {

// Units of a chunk: 256 bytes of every row, which memory gives at full speed, and some 30 KB of
// scratch for 32 rows.
inline constexpr std::int64_t kUnits = 64;

// Rows that eval mode takes at a time, for nothing but a small scratch.
inline constexpr std::int64_t kEvalRows = 32;

// One call, prepared for chunks.
struct Call {
  const Layer& layer;
  const Batch& batch;
  std::int64_t inputs;           // 2 C + 1: a first one that is 1 makes the bias a weight
  const float* labels;           // [S, B, inputs], compact
  const float* const* gamma;     // a row's gamma, [F]
  float* const* gamma_gradient;  // a row's, [F]; NULL where not wanted
};

// Floats of scratch that a chunk needs.
inline std::int64_t ForwardScratch(const Call& call) {
  const bool all = call.batch.training || call.batch.rows < kEvalRows;
  return kUnits * (call.inputs + (all ? call.batch.rows : kEvalRows));
}
inline std::int64_t BackwardScratch(const Call& call) {
  return kUnits * (2 * call.inputs + 3 * call.batch.rows);
}

struct Kernels {
  const char* name;
  // Units [unit, unit + count) of Forward, count <= kUnits.
  void (*forward)(const Call& call, const Running& running, std::int64_t unit, std::int64_t count,
                  float* scratch, float* statistics, float* out);
  // Units [unit, unit + count) of Backward but for the labels' gradients, which are added to
  // label_sums [S, B, 2 C] where that is not NULL.
  void (*backward)(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
                   const float* statistics, const Gradients& gradients, std::int64_t unit,
                   std::int64_t count, float* scratch, float* label_sums);
};

// Null where this build, or this processor, does not have the set.
const Kernels* Avx512Kernels();
const Kernels* Avx2Kernels();
const Kernels* PortableKernels();

}  // namespace diffmic::cpu::conditioning

#endif  // DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_
