#include "selftest/kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/grid_barrier.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace diffmic::selftest {
namespace {

using namespace cuda;

// Right where it is kNone.
enum Fault {
  kNone,
  kFirstBarrier,
  kSecondBarrier,
  kWarpBarrier,
  kShortWait,
  kNoCommit,
  kNoWait,
  kReadBeforeWait,
  kNoRelease,
  kNoAcquire,
  kBlocksRace,
  kReadOutside,
  kWriteOutside,
  kReadBefore,
  kDynamicOutside,
  kMisaligned,
  kSharedUnwritten,
  kScratchUnwritten,
  kDivergent,
  kLeaves,
  kWrongMask,
  kOtherExchange,
  kDeadlock,
  kWritesInput,
  kTwoBarriers,
  kFenceMissing,
  kWrongTarget,
};

// C = A B, 16 x 16 matrices in tiles of 8: two barriers a tile.
template <Fault kFault>
__global__ void Product(const Buffers b) {
  __shared__ float left[8][8], right[8][8];
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int row = static_cast<int>(blockIdx.y) * 8 + y,
            column = static_cast<int>(blockIdx.x) * 8 + x;
  float sum = 0.0f;
  for (int k = 0; k < 16; k += 8) {
    left[y][x] = b.input[row * 16 + k + x];
    right[y][x] = b.input[256 + (k + y) * 16 + column];
    if constexpr (kFault != kFirstBarrier) __syncthreads();
    for (int j = 0; j < 8; ++j) sum += left[y][j] * right[j][x];
    if constexpr (kFault != kSecondBarrier) __syncthreads();
  }
  b.output[row * 16 + column] = sum;
}

// Sums of 32 numbers by shuffles, then of the warps' sums through shared memory.
template <Fault kFault>
__global__ void Sum(const Buffers b) {
  __shared__ float parts[4];
  float value = b.input[threadIdx.x];
  const unsigned mask = kFault == kWrongMask ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    if (kFault == kOtherExchange && threadIdx.x % 32 == 5) {
      value += __shfl_down_sync(mask, value, static_cast<unsigned>(lanes));
    } else {
      value += __shfl_xor_sync(mask, value, lanes);
    }
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  if constexpr (kFault == kDivergent) {
    if (threadIdx.x < 100) __syncthreads();
  } else if constexpr (kFault == kTwoBarriers) {
    if (threadIdx.x < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kFault == kLeaves) {
    if (threadIdx.x >= 64) return;
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) b.output[0] = parts[0] + parts[1] + parts[2] + parts[3];
}

// Neighbours in a warp exchange through shared memory.
template <Fault kFault>
__global__ void Neighbours(const Buffers b) {
  __shared__ float values[64];
  values[threadIdx.x] = b.input[threadIdx.x];
  if constexpr (kFault != kWarpBarrier) __syncwarp();
  b.output[threadIdx.x] = values[threadIdx.x ^ 1];
}

// 16 x 8 from 16 x 64 and 64 x 8 in bfloat16, by a warp: copies run one stage ahead.
template <Fault kFault>
__global__ void Pipeline(const Buffers b) {
  __shared__ __align__(16) std::uint32_t left[2][128], right[2][64];
  const int lane = static_cast<int>(threadIdx.x);
  const auto* words = reinterpret_cast<const std::uint32_t*>(b.input);
  const auto copy = [&](int stage) {
    CopyAsync16(&left[stage % 2][4 * lane], words + stage * 128 + 4 * lane);
    if (lane < 16) CopyAsync16(&right[stage % 2][4 * lane], words + 512 + stage * 64 + 4 * lane);
    if (kFault != kNoCommit || stage != 2) CommitCopies();
  };
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  copy(0);
  for (int stage = 0; stage < 4; ++stage) {
    if (stage < 3) copy(stage + 1);
    if constexpr (kFault == kShortWait) {
      WaitCopies<1>();  // the last stage has none behind it
    } else if (kFault != kReadBeforeWait) {
      if (stage < 3) {
        WaitCopies<1>();
      } else {
        WaitCopies<0>();
      }
    }
    __syncwarp();
    // The left operand's rows of 16 numbers are 32 bytes; ldmatrix takes 16 of them a lane.
    std::uint32_t a[4], c[2];
    LoadMatrices(a, &left[stage % 2][(lane % 16) * 8 + lane / 16 * 4]);
    c[0] = right[stage % 2][lane / 4 * 8 + lane % 4];
    c[1] = right[stage % 2][lane / 4 * 8 + lane % 4 + 4];
    MmaBf16(d, a, c);
    if constexpr (kFault != kSecondBarrier) __syncwarp();
  }
  if constexpr (kFault == kReadBeforeWait) WaitCopies<0>();
  const int row = lane / 4, column = 2 * (lane % 4);
  b.output[row * 8 + column] = d[0];
  b.output[row * 8 + column + 1] = d[1];
  b.output[(row + 8) * 8 + column] = d[2];
  b.output[(row + 8) * 8 + column + 1] = d[3];
  if constexpr (kFault == kNoWait) {
    CopyAsync16(&left[0][4 * lane], words + 4 * lane);
    CommitCopies();
  }
}

// Blocks read what others have written, behind a barrier of the whole grid.
template <Fault kFault>
__global__ void Exchange(const Buffers b) {
  const unsigned all = gridDim.x * blockDim.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  b.workspace[i] = 2.0f * b.input[i];
  if constexpr (kFault == kNoRelease || kFault == kNoAcquire || kFault == kFirstBarrier ||
                kFault == kSecondBarrier || kFault == kWrongTarget) {
    if constexpr (kFault != kFirstBarrier) __syncthreads();
    if (threadIdx.x == 0) {
      kFault == kNoRelease ? atomicAdd(b.counter, 1u) : AddRelease(b.counter, 1);
      const unsigned target = kFault == kWrongTarget ? 1 : gridDim.x;
      if constexpr (kFault == kNoAcquire) {
        while (atomicAdd(b.counter, 0u) < target) SpinPause();
      } else {
        while (LoadAcquire(b.counter) < target) SpinPause();
      }
    }
    if constexpr (kFault != kSecondBarrier) __syncthreads();
  } else if constexpr (kFault != kBlocksRace) {
    GridBarrier barrier(b.counter);
    barrier.Sync();
    if constexpr (kFault == kDeadlock) {
      if (blockIdx.x != 1) barrier.Sync();
    }
  }
  b.output[i] = b.workspace[all - 1 - i];
}

// The block that is done last adds what all have written: fences around a relaxed counter.
template <Fault kFault>
__global__ void LastBlock(const Buffers b) {
  __shared__ bool last;
  b.workspace[blockIdx.x * blockDim.x + threadIdx.x] = b.input[blockIdx.x * 32 + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kFault != kFenceMissing) __threadfence();
    last = atomicAdd(b.counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += b.workspace[block * 32 + threadIdx.x];
  b.output[threadIdx.x] = sum;
}

// Every thread copies one number, or four at once.
template <Fault kFault>
__global__ void Copy(const Buffers b) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if constexpr (kFault == kReadOutside) {
    b.output[i] = b.input[i + 1000];
  } else if constexpr (kFault == kReadBefore) {
    b.output[i] = b.input[i - 1];
  } else if constexpr (kFault == kWriteOutside) {
    b.output[i + 961] = b.input[i];
  } else if constexpr (kFault == kWritesInput) {
    const_cast<float*>(b.input)[i] = b.input[i] + 1.0f;
  } else if constexpr (kFault == kMisaligned) {
    reinterpret_cast<float4*>(b.output)[i] = *reinterpret_cast<const float4*>(b.input + 4 * i + 1);
  } else if constexpr (kFault == kScratchUnwritten) {
    b.output[i] = b.workspace[i];
  } else if constexpr (kFault == kSharedUnwritten) {
    if (threadIdx.x != 7) shared[threadIdx.x] = b.input[i];
    __syncthreads();
    b.output[i] = shared[threadIdx.x];
  } else if constexpr (kFault == kDynamicOutside) {
    shared[threadIdx.x + 1] = b.input[i];
    __syncthreads();
    b.output[i] = shared[threadIdx.x + 1];
  } else {
    shared[threadIdx.x] = b.input[i];
    __syncthreads();
    const float one = shared[threadIdx.x];
    reinterpret_cast<float4*>(b.output)[i] = make_float4(one, one, one, one);
  }
}

template <void (*kKernel)(Buffers)>
void Start(const Buffers& buffers, dim3 grid, dim3 block, std::size_t shared = 0,
           bool cooperative = false) {
  LaunchShape shape;
  shape.grid = grid;
  shape.block = block;
  shape.shared = shared;
  shape.cooperative = cooperative;
  Launch("selftest", kKernel, shape, buffers);
}

template <Fault kFault>
void RunProduct(const Buffers& b) {
  Start<Product<kFault>>(b, dim3(2, 2), dim3(8, 8));
}
template <Fault kFault>
void RunSum(const Buffers& b) {
  Start<Sum<kFault>>(b, dim3(1), dim3(128));
}
template <Fault kFault>
void RunNeighbours(const Buffers& b) {
  Start<Neighbours<kFault>>(b, dim3(1), dim3(64));
}
template <Fault kFault>
void RunPipeline(const Buffers& b) {
  Start<Pipeline<kFault>>(b, dim3(1), dim3(32));
}
template <Fault kFault>
void RunExchange(const Buffers& b) {
  Start<Exchange<kFault>>(b, dim3(4), dim3(64), 0, true);
}
template <Fault kFault>
void RunLastBlock(const Buffers& b) {
  Start<LastBlock<kFault>>(b, dim3(5), dim3(32));
}
template <Fault kFault>
void RunCopy(const Buffers& b) {
  Start<Copy<kFault>>(b, dim3(2), dim3(32), 32 * sizeof(float));
}

}  // namespace

const std::vector<Case>& Cases() {
  static const std::vector<Case> cases = {
      {"product", true, RunProduct<kNone>},
      {"product: no barrier before the reading", false, RunProduct<kFirstBarrier>},
      {"product: no barrier before the next writing", false, RunProduct<kSecondBarrier>},
      {"sum", true, RunSum<kNone>},
      {"sum: a lane is not in its mask", false, RunSum<kWrongMask>},
      {"sum: a lane exchanges otherwise", false, RunSum<kOtherExchange>},
      {"sum: some threads skip a barrier", false, RunSum<kDivergent>},
      {"sum: two barriers for one", false, RunSum<kTwoBarriers>},
      {"sum: threads leave before a barrier", false, RunSum<kLeaves>},
      {"neighbours", true, RunNeighbours<kNone>},
      {"neighbours: no barrier of the warp", false, RunNeighbours<kWarpBarrier>},
      {"pipeline", true, RunPipeline<kNone>},
      {"pipeline: a wait that is too short", false, RunPipeline<kShortWait>},
      {"pipeline: a commit is missing", false, RunPipeline<kNoCommit>},
      {"pipeline: a copy is never waited for", false, RunPipeline<kNoWait>},
      {"pipeline: read before the wait", false, RunPipeline<kReadBeforeWait>},
      {"pipeline: no barrier before the next copy", false, RunPipeline<kSecondBarrier>},
      {"exchange", true, RunExchange<kNone>},
      {"exchange: no barrier", false, RunExchange<kBlocksRace>},
      {"exchange: no release", false, RunExchange<kNoRelease>},
      {"exchange: no acquire", false, RunExchange<kNoAcquire>},
      {"exchange: no barrier of the block before", false, RunExchange<kFirstBarrier>},
      {"exchange: no barrier of the block behind", false, RunExchange<kSecondBarrier>},
      {"exchange: the others are not waited for", false, RunExchange<kWrongTarget>},
      {"exchange: a block never comes", false, RunExchange<kDeadlock>},
      {"last block", true, RunLastBlock<kNone>},
      {"last block: no fence", false, RunLastBlock<kFenceMissing>},
      {"copy", true, RunCopy<kNone>},
      {"copy: reads behind the end", false, RunCopy<kReadOutside>},
      {"copy: reads before the beginning", false, RunCopy<kReadBefore>},
      {"copy: writes behind the end", false, RunCopy<kWriteOutside>},
      {"copy: writes its input", false, RunCopy<kWritesInput>},
      {"copy: misaligned", false, RunCopy<kMisaligned>},
      {"copy: scratch that nothing was written to", false, RunCopy<kScratchUnwritten>},
      {"copy: shared memory that nothing was written to", false, RunCopy<kSharedUnwritten>},
      {"copy: dynamic shared memory behind its end", false, RunCopy<kDynamicOutside>},
  };
  return cases;
}

}  // namespace diffmic::selftest
