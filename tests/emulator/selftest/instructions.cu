#include "instructions.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/common/ptx.cuh"

namespace diffmic::selftest {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// One warp: `in` holds a[4], b[2] and d[4] of every lane, `out` receives the new d[4].
__global__ void Mma(const std::uint32_t* in, std::uint32_t* out, int) {
  const std::uint32_t* own = in + 10 * threadIdx.x;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);
  cuda::MmaBf16(d, {own[0], own[1], own[2], own[3]}, {own[4], own[5]});
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = __float_as_uint(d[i]);
}

// Eight shuffles of one word per lane, then two of eight bytes.
__global__ void Shuffles(const std::uint32_t* in, std::uint32_t* out, int) {
  const unsigned lane = threadIdx.x;
  const std::uint32_t value = in[lane];
  out += lane;
  out[0 * 32] = __shfl_sync(kAll, value, 5);
  out[1 * 32] = __shfl_sync(kAll, value, 5, 8);
  out[2 * 32] = __shfl_xor_sync(kAll, value, 9);
  out[3 * 32] = __shfl_xor_sync(kAll, value, 8, 8);
  out[4 * 32] = __shfl_down_sync(kAll, value, 3);
  out[5 * 32] = __shfl_down_sync(kAll, value, 3, 16);
  out[6 * 32] = __shfl_up_sync(kAll, value, 2);
  out[7 * 32] = __shfl_up_sync(kAll, value, 2, 4);
  const double wide = __shfl_xor_sync(kAll, static_cast<double>(value) + 0.5, 1);
  out[8 * 32] = static_cast<std::uint32_t>(2.0 * wide);
  const std::uint64_t pair = __shfl_down_sync(kAll, std::uint64_t{value} << 32 | lane, 1);
  out[9 * 32] = static_cast<std::uint32_t>(pair >> 32) ^ static_cast<std::uint32_t>(pair);
}

// Votes and reductions over the lanes of a mask.
__global__ void Votes(const std::uint32_t* in, std::uint32_t* out, int) {
  const unsigned lane = threadIdx.x;
  const std::uint32_t value = in[lane];
  const unsigned odd = 0xAAAAAAAAu;
  const unsigned mask = lane % 2 ? odd : ~odd;
  out += lane;
  out[0 * 32] = __ballot_sync(kAll, value % 3 == 0);
  out[1 * 32] = __ballot_sync(mask, value % 3 == 0);
  out[2 * 32] = __any_sync(mask, lane == 6);
  out[3 * 32] = __all_sync(mask, lane % 2);
  out[4 * 32] = __reduce_add_sync(kAll, value);
  out[5 * 32] = __reduce_min_sync(mask, value);
  out[6 * 32] = __reduce_max_sync(mask, value);
}

// float32 to bfloat16, to float16 (and back) and to float8, and a bfloat16 product with 1.7.
__global__ void Narrow(const std::uint32_t* in, std::uint32_t* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) {
    const float value = __uint_as_float(in[i]);
    out[i] = __float_as_uint(__bfloat162float(__float2bfloat16_rn(value)));
    out[count + i] = __float_as_uint(__half2float(__float2half_rn(value)));
    out[2 * count + i] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
    const __nv_bfloat162 product =
        __hmul2(__floats2bfloat162_rn(value, 2.0f * value), __floats2bfloat162_rn(1.7f, 1.7f));
    out[3 * count + i] = __float_as_uint(__bfloat162float(product.x));
    out[4 * count + i] = __float_as_uint(__bfloat162float(product.y));
  }
}

// Integer intrinsics of one word.
__global__ void Bits(const std::uint32_t* in, std::uint32_t* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) {
    const std::uint32_t value = in[i];
    out[0 * count + i] = static_cast<std::uint32_t>(__popc(value));
    out[1 * count + i] = static_cast<std::uint32_t>(__clz(static_cast<int>(value)));
    out[2 * count + i] = static_cast<std::uint32_t>(__ffs(static_cast<int>(value)));
    out[3 * count + i] = __umulhi(value, 0x9E3779B9u);
    out[4 * count + i] = __brev(value);
  }
}

// Eight atomics on separate words, by 4 blocks of 64 threads; the operand of thread t is t % 7.
__global__ void Atomics(const std::uint32_t* in, std::uint32_t* out, int) {
  const std::uint32_t value = in[threadIdx.x] % 7;
  atomicAdd(out + 0, value);
  atomicMax(out + 1, value);
  atomicMin(out + 2, value);
  atomicOr(out + 3, 1u << value);
  atomicXor(out + 4, value);
  atomicAdd(reinterpret_cast<unsigned long long*>(out + 6), 0x80000000ull);
  // A maximum of squares by compare-and-swap.
  std::uint32_t seen = atomicAdd(out + 5, 0u);
  while (seen < value * value) {
    const std::uint32_t before = atomicCAS(out + 5, seen, value * value);
    if (before == seen) break;
    seen = before;
  }
}

// ---- kernels of known memory traffic -----------------------------------------------------------

// A warp copies 32 words that are contiguous or 8 apart, or 32 vectors of 16 bytes.
__global__ void MoveWords(const std::uint32_t* in, std::uint32_t* out, int) {
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void MoveEighth(const std::uint32_t* in, std::uint32_t* out, int) {
  out[threadIdx.x] = in[8 * threadIdx.x];
}
__global__ void MoveVectors(const std::uint32_t* in, std::uint32_t* out, int) {
  const uint4 value = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  uint4 next;
  next.x = value.x + 1;
  next.y = value.y + 1;
  next.z = value.z + 1;
  next.w = value.w + 1;
  reinterpret_cast<uint4*>(out)[threadIdx.x] = next;
}

// Transposes 32 x 32 words through shared memory whose rows have a pitch of 32 + kPad, by 8 warps.
template <int kPad>
__global__ void Transpose(const std::uint32_t* in, std::uint32_t* out, int) {
  __shared__ std::uint32_t tile[32][32 + kPad];
  for (unsigned row = threadIdx.y; row < 32; row += 8)
    tile[row][threadIdx.x] = in[32 * row + threadIdx.x];
  __syncthreads();
  for (unsigned row = threadIdx.y; row < 32; row += 8)
    out[32 * row + threadIdx.x] = tile[threadIdx.x][row];
}

// Copies 512 bytes asynchronously to shared memory and reads them as vectors.
__global__ void MoveCopies(const std::uint32_t* in, std::uint32_t* out, int) {
  __shared__ __align__(16) std::uint32_t words[128];
  cuda::CopyAsync16(words + 4 * threadIdx.x, in + 4 * threadIdx.x);
  cuda::CommitCopies();
  cuda::WaitCopies<0>();
  const uint4 value = *reinterpret_cast<const uint4*>(words + 4 * threadIdx.x);
  reinterpret_cast<uint4*>(out)[threadIdx.x] = value;
}

}  // namespace

std::vector<Instruction> Instructions() {
  const cuda::LaunchShape warp{1, 32};
  const cuda::LaunchShape tile{1, {32, 8}};
  return {
      {"mma", &Mma, warp},
      {"shuffles", &Shuffles, warp},
      {"votes", &Votes, warp},
      {"narrow", &Narrow, warp},
      {"bits", &Bits, warp},
      {"atomics", &Atomics, {4, 64}},
      {"move words", &MoveWords, warp},
      {"move every eighth", &MoveEighth, warp},
      {"move vectors", &MoveVectors, warp},
      {"transpose", &Transpose<0>, tile},
      {"transpose padded", &Transpose<1>, tile},
      {"move copies", &MoveCopies, warp},
  };
}

}  // namespace diffmic::selftest
