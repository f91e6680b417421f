// The interface between the driver of `conditioning` (conditioning.cpp) and its kernels
// (conditioning_kernels.inc.h, compiled once per instruction set).
#ifndef DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_
#define DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_

#include <cstdint>

#include "include/conditioning_call.h"

namespace diffmic::cpu::conditioning {

using namespace diffmic::conditioning;

// Output channels of a chunk: 256 bytes of every row, enough for full memory bandwidth, and some 30
// KB of workspace for 32 rows.
inline constexpr std::int64_t kChannels = 64;

// Rows per pass in eval mode, which bounds the workspace.
inline constexpr std::int64_t kEvalRows = 32;

// One call, prepared for its chunks.
struct Call {
  const Layer& layer;
  const Batch& batch;
  std::int64_t inputs;           // 2 C + 1: a leading 1 turns the bias into a weight
  const float* labels;           // [S, B, inputs], compact
  const float* const* gamma;     // [B] pointers to a row's gamma, [F]
  float* const* gamma_gradient;  // [B] pointers to a row's, [F]; null where not wanted
};

// Floats of workspace per chunk.
inline std::int64_t ForwardWorkspace(const Call& call) {
  const bool all = call.batch.training || call.batch.rows < kEvalRows;
  return kChannels * (call.inputs + (all ? call.batch.rows : kEvalRows));
}
inline std::int64_t BackwardWorkspace(const Call& call) {
  return kChannels * (2 * call.inputs + 3 * call.batch.rows);
}

struct Kernels {
  // Forward for channels [channel, channel + count), count <= kChannels.
  void (*forward)(const Call& call, const Running& running, std::int64_t channel,
                  std::int64_t count, float* workspace, float* statistics, float* out);
  // Backward for the same channels, except that the gradients of the labels are added to label_sums
  // [S, B, 2 C] where that is not null.
  void (*backward)(const Call& call, const float* grad, const std::int64_t (&grad_stride)[2],
                   const float* statistics, const Gradients& gradients, std::int64_t channel,
                   std::int64_t count, float* workspace, float* label_sums);
};

}  // namespace diffmic::cpu::conditioning

namespace diffmic::cpu {

namespace portable {
extern const conditioning::Kernels kConditioningKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const conditioning::Kernels kConditioningKernels;
}
namespace avx512 {
extern const conditioning::Kernels kConditioningKernels;
}
#endif

}  // namespace diffmic::cpu

#endif  // DIFFMIC_CPU_CONDITIONING_CONDITIONING_KERNEL_TABLE_H_
