// A pipeline of asynchronous copies that feeds mma instructions.
#include "cases.h"
#include "cuda/common/ptx.cuh"

namespace diffmic::selftest {
namespace {

enum class Fault {
  kNone,
  kShortWait,
  kNoCommit,
  kReadsBeforeWait,
  kNoBarrierAfterWait,
  kNoBarrierAfterReads,
  kCopyAtExit,
  kOpenAtExit,
  kMisaligned,
  kPastEnd,
  kStoreUnderWay,
};

// Words of a stage: A [16, 16] row-major, then B [16, 16] column-major, two bfloat16 in a word.
constexpr int kStage = 256;
constexpr int kSlots = 2;

// out [16, 16] = the sum of A B over the stages; each of two warps computes eight columns.
template <Fault kFault>
__global__ void Pipeline(const float* in, float* out, std::uint32_t*, int count) {
  __shared__ __align__(16) std::uint32_t ring[kSlots][kStage];
  const int stages = count / kStage;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const auto fetch = [&](int stage) {
    const int wrong = kFault == Fault::kMisaligned && thread == 17 ? 1 : 0;
    if (stage < stages || (kFault == Fault::kPastEnd && thread == 30)) {
      cuda::CopyAsync16(&ring[stage % kSlots][4 * thread],
                        in + stage * kStage + 4 * thread + wrong);
    }
    if (kFault == Fault::kStoreUnderWay && stage == 1) ring[1][4 * thread] = 0;
    if constexpr (kFault != Fault::kNoCommit) cuda::CommitCopies();
  };
  float sums[4] = {};
  const auto multiply = [&](int stage) {
    // The fragments of MmaBf16: rows of eight words.
    const std::uint32_t* a = &ring[stage % kSlots][lane / 4 * 8 + lane % 4];
    const std::uint32_t* b = a + 128 + 64 * warp;
    cuda::MmaBf16(sums, {a[0], a[64], a[4], a[68]}, {b[0], b[4]});
  };
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    if constexpr (kFault == Fault::kReadsBeforeWait) multiply(stage);
    cuda::WaitCopies<kFault == Fault::kShortWait ? 2 : 1>();
    if constexpr (kFault != Fault::kNoBarrierAfterWait) __syncthreads();
    if constexpr (kFault != Fault::kReadsBeforeWait) multiply(stage);
    if constexpr (kFault != Fault::kNoBarrierAfterReads) __syncthreads();
  }
  cuda::WaitCopies<0>();
  if constexpr (kFault == Fault::kCopyAtExit || kFault == Fault::kOpenAtExit) {
    __syncthreads();
    cuda::CopyAsync16(&ring[0][4 * thread], in + 4 * thread);
    if constexpr (kFault == Fault::kCopyAtExit) cuda::CommitCopies();
  }
  for (int i = 0; i < 4; ++i) {
    out[(lane / 4 + i / 2 * 8) * 16 + 8 * warp + lane % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace

std::vector<Case> Copies() {
  const cuda::LaunchShape two{1, 64};
  return {
      {"pipeline", "", &Pipeline<Fault::kNone>, two},
      {"pipeline", "wait too short", &Pipeline<Fault::kShortWait>, two},
      {"pipeline", "no commit", &Pipeline<Fault::kNoCommit>, two},
      {"pipeline", "reads before the wait", &Pipeline<Fault::kReadsBeforeWait>, two},
      {"pipeline", "no barrier after the wait", &Pipeline<Fault::kNoBarrierAfterWait>, two},
      {"pipeline", "no barrier after reads", &Pipeline<Fault::kNoBarrierAfterReads>, two},
      {"pipeline", "copy at exit", &Pipeline<Fault::kCopyAtExit>, two},
      {"pipeline", "open copy at exit", &Pipeline<Fault::kOpenAtExit>, two},
      {"pipeline", "misaligned", &Pipeline<Fault::kMisaligned>, two},
      {"pipeline", "past the end", &Pipeline<Fault::kPastEnd>, two},
      {"pipeline", "store under way", &Pipeline<Fault::kStoreUnderWay>, two},
  };
}

}  // namespace diffmic::selftest
