// Shuffles between the lanes of a warp.
#include "cases.h"

namespace diffmic::selftest {
namespace {

enum class Fault { kNone, kNotInMask, kAbsentLane, kOtherOperation, kOtherMask, kOrderBySum };

constexpr unsigned kAll = 0xFFFFFFFFu;

// Sums over 16 lanes each.
template <Fault kFault>
__global__ void SumHalves(const float* in, float* out, std::uint32_t*, int) {
  const unsigned lane = threadIdx.x % 32;
  float sum = in[threadIdx.x];
  if (kFault == Fault::kAbsentLane && threadIdx.x == 40) return;
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  const unsigned mask = kFault == Fault::kNotInMask   ? 0x0000FFFFu
                        : kFault == Fault::kOtherMask ? (lane == 3 ? kAll : half)
                                                      : half;
  for (int step = 8; step > 0; step /= 2) {
    if (kFault == Fault::kOtherOperation && lane == 6 && step == 2) {
      sum += __shfl_down_sync(mask, sum, 2, 16);
    } else {
      sum += __shfl_xor_sync(mask, sum, step, 16);
    }
  }
  out[threadIdx.x] = sum;
}

// A warp's sum through shared memory: a shuffle does not order memory accesses.
template <Fault kFault>
__global__ void SumShared(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float totals[2];
  const unsigned warp = threadIdx.x / 32;
  float sum = in[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) totals[warp] = sum;
  if (kFault == Fault::kOrderBySum) {
    __shfl_sync(kAll, sum, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = totals[warp];
}

}  // namespace

std::vector<Case> Warps() {
  const cuda::LaunchShape block{1, 64};
  return {
      {"sum halves", "", &SumHalves<Fault::kNone>, block},
      {"sum halves", "lane not in its mask", &SumHalves<Fault::kNotInMask>, block},
      {"sum halves", "lane does not come", &SumHalves<Fault::kAbsentLane>, block},
      {"sum halves", "another operation", &SumHalves<Fault::kOtherOperation>, block},
      {"sum halves", "another mask", &SumHalves<Fault::kOtherMask>, block},
      {"sum shared", "", &SumShared<Fault::kNone>, block},
      {"sum shared", "exchange for a barrier", &SumShared<Fault::kOrderBySum>, block},
  };
}

}  // namespace diffmic::selftest
