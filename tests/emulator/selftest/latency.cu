// Loads that wait for each other, and loads that do not.
#include "cases.h"
#include "cuda/common/loads.cuh"

namespace diffmic::selftest {
namespace {

enum class Fault { kNone, kPastEnd };

// The sum of three elements: one from DRAM, then two in the L2 cache, one after the other.
__global__ void InTurn(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(threadIdx.x);
  float sum = in[i];
  __syncthreads();
  for (int k = 1; k < 3; ++k) sum += in[(i + 16 * k) % count];
  out[i] = sum;
}

// The same, with the last two together.
__global__ void Together(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(threadIdx.x);
  const float first = in[i];
  __syncthreads();
  cuda::InFlight<float> rest[2];
  for (int k = 1; k < 3; ++k) rest[k - 1] = cuda::LoadAhead(in + (i + 16 * k) % count);
  out[i] = first + rest[0] + rest[1];
}

// An element whose index is the value of another one, all of them in the L2 cache.
__global__ void Chase(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(threadIdx.x);
  cuda::PrefetchL2(in + i);
  __syncthreads();
  const cuda::InFlight<float> first = cuda::LoadAhead(in + i);
  const cuda::InFlight<float> second = cuda::LoadAhead(in + static_cast<int>(first + 16) % count);
  out[i] = second;
}

// The sum of four elements of a block, each added by another thread after the one before.
template <bool kByShuffles>
__global__ void Relay(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float passed;
  const int i = static_cast<int>(threadIdx.x);
  const int begin = static_cast<int>(blockIdx.x * blockDim.x);
  float sum = 0.0f;
  for (int turn = 0; turn < 4; ++turn) {
    if (i == turn) sum += in[begin + 8 * turn];
    if constexpr (kByShuffles) {
      sum = __shfl_sync(0xFFFFFFFFu, sum, turn);
    } else {
      if (i == turn) passed = sum;
      __syncthreads();
      sum = passed;
      __syncthreads();
    }
  }
  out[begin + i] = sum;
}

template <Fault kFault>
__global__ void Prefetched(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(threadIdx.x);
  cuda::PrefetchL2(in + i + (kFault == Fault::kPastEnd ? count : 0));
  __syncthreads();
  out[i] = in[i];
}

}  // namespace

std::vector<Case> Latency() {
  const cuda::LaunchShape block{1, 64}, warps{2, 32};
  return {
      {"in turn", "", &InTurn, block},
      {"together", "", &Together, block},
      {"chase", "", &Chase, block},
      {"relay", "", &Relay<false>, warps},
      {"relay by shuffles", "", &Relay<true>, warps},
      {"prefetched", "", &Prefetched<Fault::kNone>, block},
      {"prefetched", "past the end", &Prefetched<Fault::kPastEnd>, block},
  };
}

}  // namespace diffmic::selftest
