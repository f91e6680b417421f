// Synchronisation of thread blocks through global memory.
#include "cases.h"
#include "cuda/common/grid_barrier.cuh"
#include "cuda/common/ptx.cuh"

namespace diffmic::selftest {
namespace {

enum class Fault {
  kNone,
  kNoBarrier,
  kNoRelease,
  kNoAcquire,
  kArrivesAlone,
  kLeavesAlone,
  kNotCooperative,
  kNobodyCounts,
  kNoFence,
  kPlainSum,
  kOverlap,
  kNoBlockBarrier,
};

// The barrier of csrc/cuda/common/grid_barrier.cuh, with one part missing.
template <Fault kFault>
__device__ void Cross(std::uint32_t* counter) {
  if constexpr (kFault == Fault::kNoBarrier) return;
  if constexpr (kFault != Fault::kArrivesAlone) __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kFault == Fault::kNoRelease) {
      atomicAdd(counter, 1u);
    } else if constexpr (kFault != Fault::kNobodyCounts) {
      cuda::AddRelease(counter, 1);
    }
    const auto left = [&] {
      const std::uint32_t now =
          kFault == Fault::kNoAcquire ? atomicAdd(counter, 0u) : cuda::LoadAcquire(counter);
      return now < gridDim.x;
    };
    while (left()) cuda::SpinPause();
  }
  if constexpr (kFault != Fault::kLeavesAlone) __syncthreads();
}

// out[i] = 2 in[element of the next block], exchanged through the workspace.
template <Fault kFault>
__global__ void Swap(const float* in, float* out, std::uint32_t* workspace, int count) {
  auto* between = reinterpret_cast<float*>(workspace + 16);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  between[i] = 2.0f * in[i];
  Cross<kFault>(workspace);
  out[i] = __ldcg(between + (i + static_cast<int>(blockDim.x)) % count);
}

// Several rounds with the package's GridBarrier: block b adds the elements of block b + 1.
__global__ void Rounds(const float* in, float* out, std::uint32_t* workspace, int count) {
  cuda::GridBarrier barrier(workspace);
  auto* between = reinterpret_cast<float*>(workspace + 16);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float mine = in[i];
  for (int round = 0; round < 3; ++round) {
    between[i] = mine;
    barrier.Sync();
    mine += __ldcg(between + (i + static_cast<int>(blockDim.x)) % count);
    barrier.Sync();
  }
  out[i] = mine;
}

// The last block to arrive reads the elements of all blocks: fences and a counter.
template <Fault kFault>
__global__ void LastSums(const float* in, float* out, std::uint32_t* workspace, int) {
  auto* parts = reinterpret_cast<float*>(workspace + 16);
  __shared__ bool last;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  parts[i] = in[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kFault != Fault::kNoFence) __threadfence();
    last = atomicAdd(workspace, 1u) == gridDim.x - 1;
    if constexpr (kFault != Fault::kNoFence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const unsigned total = gridDim.x * blockDim.x;
  for (unsigned k = threadIdx.x; k < total; k += blockDim.x) out[k] = parts[total - 1 - k];
}

// Counts the threads of the grid.
template <Fault kFault>
__global__ void CountAll(const float*, float* out, std::uint32_t* workspace, int) {
  if constexpr (kFault == Fault::kPlainSum) {
    *workspace += 1;
  } else {
    atomicAdd(workspace, 1u);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

// out = in, in parts of the blocks that do not overlap.
template <Fault kFault>
__global__ void Parts(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  out[i] = in[i];
  if (kFault == Fault::kOverlap && i + 1 < count) out[i + 1] = in[i + 1];
}

// Threads of a block exchange elements through global memory.
template <Fault kFault>
__global__ void Neighbours(const float* in, float* out, std::uint32_t* workspace, int) {
  auto* between = reinterpret_cast<float*>(workspace + 16);
  const unsigned i = threadIdx.x;
  const unsigned begin = blockIdx.x * blockDim.x;
  between[begin + i] = in[begin + i];
  if constexpr (kFault != Fault::kNoBlockBarrier) __syncthreads();
  out[begin + i] = between[begin + (i + 1) % blockDim.x];
}

}  // namespace

std::vector<Case> Grids() {
  const cuda::LaunchShape plain{4, 16};
  cuda::LaunchShape together = plain;
  together.cooperative = true;
  return {
      {"swap", "", &Swap<Fault::kNone>, together},
      {"swap", "no barrier", &Swap<Fault::kNoBarrier>, together},
      {"swap", "no release", &Swap<Fault::kNoRelease>, together},
      {"swap", "no acquire", &Swap<Fault::kNoAcquire>, together},
      {"swap", "no barrier before it counts", &Swap<Fault::kArrivesAlone>, together},
      {"swap", "no barrier after the wait", &Swap<Fault::kLeavesAlone>, together},
      {"swap", "nobody counts", &Swap<Fault::kNobodyCounts>, together},
      {"swap", "not cooperative", &Swap<Fault::kNotCooperative>, plain},
      {"rounds", "", &Rounds, together},
      {"last sums", "", &LastSums<Fault::kNone>, plain},
      {"last sums", "no fence", &LastSums<Fault::kNoFence>, plain},
      {"count all", "", &CountAll<Fault::kNone>, plain},
      {"count all", "plain sum", &CountAll<Fault::kPlainSum>, plain},
      {"parts", "", &Parts<Fault::kNone>, plain},
      {"parts", "overlap", &Parts<Fault::kOverlap>, plain},
      {"neighbours", "", &Neighbours<Fault::kNone>, plain},
      {"neighbours", "no barrier", &Neighbours<Fault::kNoBlockBarrier>, plain},
  };
}

}  // namespace diffmic::selftest
