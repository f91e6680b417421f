// Barriers of thread blocks and warps.
#include "cases.h"

namespace diffmic::selftest {
namespace {

constexpr int kTile = 8;
constexpr int kSize = 16;  // the matrices of Product are 16 x 16

enum class Fault {
  kNone,
  kNoBarrierAfterWrites,
  kNoBarrierAfterReads,
  kNoWarpBarrier,
  kWarpBarrierForBlock,
  kEarlyExit,
  kTwoBarriers,
};

// out = in in, by tiles in shared memory: one thread per element, four blocks.
template <Fault kFault>
__global__ void Product(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float left[kTile][kTile];
  __shared__ float right[kTile][kTile];
  const int x = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  const int row = static_cast<int>(blockIdx.y) * kTile + y;
  const int column = static_cast<int>(blockIdx.x) * kTile + x;
  float sum = 0.0f;
  for (int k = 0; k < kSize; k += kTile) {
    left[y][x] = in[row * kSize + k + x];
    right[y][x] = in[(k + y) * kSize + column];
    if constexpr (kFault != Fault::kNoBarrierAfterWrites) __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += left[y][i] * right[i][x];
    if constexpr (kFault != Fault::kNoBarrierAfterReads) __syncthreads();
  }
  out[row * kSize + column] = sum;
}

// Every warp reverses its 32 elements through its own shared memory.
template <Fault kFault>
__global__ void ReverseWarp(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float numbers[64];
  const unsigned i = threadIdx.x;
  numbers[i] = in[i];
  if constexpr (kFault != Fault::kNoWarpBarrier) __syncwarp();
  out[i] = numbers[i ^ 31];
}

// The block reverses its elements; a warp barrier is not sufficient.
template <Fault kFault>
__global__ void ReverseBlock(const float* in, float* out, std::uint32_t*, int) {
  float* numbers = reinterpret_cast<float*>(dynamic_shared);
  const unsigned i = threadIdx.x;
  numbers[i] = in[i];
  if constexpr (kFault == Fault::kWarpBarrierForBlock) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[i] = numbers[blockDim.x - 1 - i];
}

// out = in + 1; the barrier orders nothing, the test is whether all threads reach it.
template <Fault kFault>
__global__ void Meet(const float* in, float* out, std::uint32_t*, int) {
  const unsigned i = threadIdx.x;
  if constexpr (kFault == Fault::kEarlyExit) {
    if (i == 5) return;
  }
  if constexpr (kFault == Fault::kTwoBarriers) {
    if (i % 2 == 0) {
      out[i] = in[i];
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  out[i] = in[i] + 1.0f;
}

// Eight warps read one element, which one thread then changes.
template <Fault kFault>
__global__ void Broadcast(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float number;
  const unsigned i = threadIdx.x;
  if (i == 0) number = in[0];
  __syncthreads();
  const float first = number;
  if constexpr (kFault != Fault::kNoBarrierAfterReads) __syncthreads();
  if (i == 37) number = in[1];
  __syncthreads();
  out[i] = first + number;
}

}  // namespace

std::vector<Case> Barriers() {
  const cuda::LaunchShape tiles{{2, 2}, {kTile, kTile}};
  const cuda::LaunchShape block{1, 64, 64 * sizeof(float)};
  const cuda::LaunchShape warps{1, 256};
  return {
      {"product", "", &Product<Fault::kNone>, tiles},
      {"product", "no barrier after writes", &Product<Fault::kNoBarrierAfterWrites>, tiles},
      {"product", "no barrier after reads", &Product<Fault::kNoBarrierAfterReads>, tiles},
      {"reverse warp", "", &ReverseWarp<Fault::kNone>, block},
      {"reverse warp", "no warp barrier", &ReverseWarp<Fault::kNoWarpBarrier>, block},
      {"reverse block", "", &ReverseBlock<Fault::kNone>, block},
      {"reverse block", "warp barrier for a block", &ReverseBlock<Fault::kWarpBarrierForBlock>,
       block},
      {"meet", "", &Meet<Fault::kNone>, block},
      {"meet", "early exit", &Meet<Fault::kEarlyExit>, block},
      {"meet", "two barriers", &Meet<Fault::kTwoBarriers>, block},
      {"broadcast", "", &Broadcast<Fault::kNone>, warps},
      {"broadcast", "no barrier after reads", &Broadcast<Fault::kNoBarrierAfterReads>, warps},
  };
}

}  // namespace diffmic::selftest
