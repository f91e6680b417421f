// Faults of a single access: out of bounds, misaligned, uninitialised memory.
#include "cases.h"

namespace diffmic::selftest {
namespace {

enum class Fault {
  kNone,
  kReadPastEnd,
  kReadBeforeBegin,
  kReadElsewhere,
  kWritePastEnd,
  kWriteToInput,
  kMisalignedRead,
  kMisalignedWrite,
  kPastDynamic,
  kPastStatic,
  kPastRow,
  kUnwrittenShared,
  kUnwrittenWorkspace,
  kSharedOfOtherBlock,
};

// out = in + 1, one thread per element.
template <Fault kFault>
__global__ void AddOne(const float* in, float* out, std::uint32_t*, int count) {
  const int i = static_cast<int>(threadIdx.x);
  const int last = count - 1;
  int from = i;
  if (kFault == Fault::kReadPastEnd && i == last) from = count;
  if (kFault == Fault::kReadBeforeBegin && i == 0) from = -1;
  if (kFault == Fault::kReadElsewhere && i == 3) from = 1 << 28;
  const float value = in[from] + 1.0f;
  if (kFault == Fault::kWritePastEnd && i == last) {
    out[count] = value;
  } else if (kFault == Fault::kWriteToInput && i == 7) {
    const_cast<float*>(in)[i] = value;
  } else {
    out[i] = value;
  }
}

// out = in, four elements per thread.
template <Fault kFault>
__global__ void CopyVectors(const float* in, float* out, std::uint32_t*, int count) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i + 4 > count) return;
  const bool wrong = i == 8;
  const float4 value = *reinterpret_cast<const float4*>(
      in + i + (kFault == Fault::kMisalignedRead && wrong ? 1 : 0));
  *reinterpret_cast<float4*>(out + i + (kFault == Fault::kMisalignedWrite && wrong ? 2 : 0)) =
      make_float4(value.x, value.y, value.z, value.w);
}

// Reverses `in` through dynamic shared memory of one element per thread.
template <Fault kFault>
__global__ void ThroughDynamic(const float* in, float* out, std::uint32_t*, int count) {
  float* numbers = reinterpret_cast<float*>(dynamic_shared);
  const int i = static_cast<int>(threadIdx.x);
  const int shift = kFault == Fault::kPastDynamic ? 1 : 0;
  if (kFault != Fault::kUnwrittenShared || i != 9) numbers[i + shift] = in[i];
  __syncthreads();
  out[i] = numbers[count - 1 - i + shift];
}

// The same through static arrays; past the end of one array is another.
template <Fault kFault>
__global__ void ThroughStatic(const float* in, float* out, std::uint32_t*, int count) {
  __shared__ float rows[8][8];
  __shared__ float others[64];
  const int i = static_cast<int>(threadIdx.x);
  const int past = kFault == Fault::kPastStatic && i == 63 ? 1 : 0;
  const int aside = kFault == Fault::kPastRow && i == 7 ? 1 : 0;
  others[i + past] = in[i];
  __syncthreads();
  rows[i / 8][i % 8 + aside] = others[count - 1 - i];
  __syncthreads();
  out[i] = rows[i / 8][i % 8 + aside];
}

// out = in + 1 through an uninitialised workspace.
template <Fault kFault>
__global__ void Workspace(const float* in, float* out, std::uint32_t* workspace, int) {
  const unsigned i = threadIdx.x;
  std::uint32_t* mine = workspace + 16 + i;
  if (kFault != Fault::kUnwrittenWorkspace || i != 20) *mine = __float_as_uint(in[i]);
  out[i] = __uint_as_float(*mine) + 1.0f;
}

// Two blocks: the second one does not see the shared memory of the first.
template <Fault kFault>
__global__ void OwnShared(const float* in, float* out, std::uint32_t*, int) {
  __shared__ float numbers[32];
  const unsigned i = threadIdx.x;
  if (kFault != Fault::kSharedOfOtherBlock || blockIdx.x == 0) numbers[i] = in[i];
  out[blockIdx.x * 32 + i] = numbers[i];
}

}  // namespace

std::vector<Case> Bounds() {
  const cuda::LaunchShape block{1, 64, 64 * sizeof(float)};
  const cuda::LaunchShape two{2, 32};
  return {
      {"add one", "", &AddOne<Fault::kNone>, block},
      {"add one", "read past the end", &AddOne<Fault::kReadPastEnd>, block},
      {"add one", "read before the begin", &AddOne<Fault::kReadBeforeBegin>, block},
      {"add one", "read elsewhere", &AddOne<Fault::kReadElsewhere>, block},
      {"add one", "write past the end", &AddOne<Fault::kWritePastEnd>, block},
      {"add one", "write to an input", &AddOne<Fault::kWriteToInput>, block},
      {"copy vectors", "", &CopyVectors<Fault::kNone>, block},
      {"copy vectors", "misaligned read", &CopyVectors<Fault::kMisalignedRead>, block},
      {"copy vectors", "misaligned write", &CopyVectors<Fault::kMisalignedWrite>, block},
      {"through dynamic", "", &ThroughDynamic<Fault::kNone>, block},
      {"through dynamic", "past the end", &ThroughDynamic<Fault::kPastDynamic>, block},
      {"through dynamic", "unwritten", &ThroughDynamic<Fault::kUnwrittenShared>, block},
      {"through static", "", &ThroughStatic<Fault::kNone>, block},
      {"through static", "past the end", &ThroughStatic<Fault::kPastStatic>, block},
      {"through static", "past a row", &ThroughStatic<Fault::kPastRow>, block},
      {"workspace", "", &Workspace<Fault::kNone>, block},
      {"workspace", "unwritten", &Workspace<Fault::kUnwrittenWorkspace>, block},
      {"own shared", "", &OwnShared<Fault::kNone>, two},
      {"own shared", "of another block", &OwnShared<Fault::kSharedOfOtherBlock>, two},
  };
}

}  // namespace diffmic::selftest
