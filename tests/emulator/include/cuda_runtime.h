// Replaces CUDA's header: the part of CUDA C++ and of the runtime that kernels use, in standard
// C++. Semantics are those of the CUDA C++ Programming Guide.
#ifndef DIFFMIC_EMULATOR_CUDA_RUNTIME_H_
#define DIFFMIC_EMULATOR_CUDA_RUNTIME_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// The module's thread-local memory is the shared memory of the running block.
#define __shared__ thread_local
#define EMULATED inline __attribute__((always_inline))

// ---- vectors -----------------------------------------------------------------------------------

#define EMULATED_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {              \
    type x, y;                                  \
  };                                            \
  EMULATED name make_##name(type x, type y) { return {x, y}; }
#define EMULATED_VECTOR3(name, type) \
  struct name {                      \
    type x, y, z;                    \
  };                                 \
  EMULATED name make_##name(type x, type y, type z) { return {x, y, z}; }
#define EMULATED_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {              \
    type x, y, z, w;                            \
  };                                            \
  EMULATED name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR2(char2, signed char, 2)
EMULATED_VECTOR2(uchar2, unsigned char, 2)
EMULATED_VECTOR2(short2, short, 4)
EMULATED_VECTOR2(ushort2, unsigned short, 4)
EMULATED_VECTOR2(int2, int, 8)
EMULATED_VECTOR2(uint2, unsigned, 8)
EMULATED_VECTOR2(float2, float, 8)
EMULATED_VECTOR2(double2, double, 16)
EMULATED_VECTOR2(longlong2, long long, 16)
EMULATED_VECTOR2(ulonglong2, unsigned long long, 16)
EMULATED_VECTOR3(float3, float)
EMULATED_VECTOR3(int3, int)
EMULATED_VECTOR3(uint3, unsigned)
EMULATED_VECTOR4(char4, signed char, 4)
EMULATED_VECTOR4(uchar4, unsigned char, 4)
EMULATED_VECTOR4(short4, short, 8)
EMULATED_VECTOR4(ushort4, unsigned short, 8)
EMULATED_VECTOR4(int4, int, 16)
EMULATED_VECTOR4(uint4, unsigned, 16)
EMULATED_VECTOR4(float4, float, 16)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Of the running thread; updated at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- threads -----------------------------------------------------------------------------------

EMULATED void __syncthreads() { diffmic::emulator::BlockBarrier(); }
EMULATED void __syncwarp(unsigned mask = 0xFFFFFFFFu) { diffmic::emulator::WarpBarrier(mask); }
EMULATED void __threadfence() { diffmic::emulator::Fence(); }
EMULATED void __threadfence_block() { diffmic::emulator::Fence(); }
EMULATED void __nanosleep(unsigned) { diffmic::emulator::SpinPause(); }

namespace diffmic::emulator {

// Not instrumented: the exchange buffers are not memory of the kernel.
#define EMULATED_EXCHANGE __attribute__((no_sanitize("thread"), noinline))

// The value of another lane of `mask`; undefined for a lane outside `mask`.
template <typename T>
EMULATED_EXCHANGE T FromLane(std::uint32_t mask, const char* operation, T value, unsigned lane) {
  static_assert(sizeof(T) <= kMostExchanged && std::is_trivially_copyable_v<T>);
  T result;
  Count(Event::kShuffle);
  std::memcpy(&result,
              Exchange(mask, operation, &value, sizeof value, __builtin_return_address(0)) +
                  sizeof value * (lane & 31),
              sizeof result);
  return result;
}

// Reduces the values of all lanes of `mask`, in the order of lanes.
template <typename T, typename F>
EMULATED_EXCHANGE T Reduce(std::uint32_t mask, const char* operation, T value, F fold) {
  const unsigned char* slots =
      Exchange(mask, operation, &value, sizeof value, __builtin_return_address(0));
  bool first = true;
  T result{};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    T other;
    std::memcpy(&other, slots + sizeof other * lane, sizeof other);
    result = first ? other : fold(result, other);
    first = false;
  }
  return result;
}

// `target` if it is in this lane's segment of `width` lanes, else this lane.
EMULATED unsigned Within(unsigned width, int target) {
  const unsigned lane = Lane();
  const int begin = static_cast<int>(lane & ~(width - 1));
  return target >= begin && target < begin + static_cast<int>(width) ? static_cast<unsigned>(target)
                                                                     : lane;
}

}  // namespace diffmic::emulator

template <typename T>
EMULATED T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned begin = diffmic::emulator::Lane() & ~static_cast<unsigned>(width - 1);
  return diffmic::emulator::FromLane(mask, "__shfl_sync", value,
                                     begin + (static_cast<unsigned>(lane) & (width - 1)));
}
template <typename T>
EMULATED T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  namespace e = diffmic::emulator;
  const int target = static_cast<int>(e::Lane() ^ static_cast<unsigned>(lanes));
  return e::FromLane(mask, "__shfl_xor_sync", value, e::Within(width, target));
}
template <typename T>
EMULATED T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  namespace e = diffmic::emulator;
  const int target = static_cast<int>(e::Lane() + lanes);
  return e::FromLane(mask, "__shfl_down_sync", value, e::Within(width, target));
}
template <typename T>
EMULATED T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  namespace e = diffmic::emulator;
  const int target = static_cast<int>(e::Lane()) - static_cast<int>(lanes);
  return e::FromLane(mask, "__shfl_up_sync", value, e::Within(width, target));
}
EMULATED unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate ? 1u << diffmic::emulator::Lane() : 0u;
  return diffmic::emulator::Reduce(mask, "__ballot_sync", bit,
                                   [](unsigned a, unsigned b) { return a | b; });
}
EMULATED int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
EMULATED int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
EMULATED T __reduce_add_sync(unsigned mask, T value) {
  return diffmic::emulator::Reduce(mask, "__reduce_add_sync", value,
                                   [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
EMULATED T __reduce_min_sync(unsigned mask, T value) {
  return diffmic::emulator::Reduce(mask, "__reduce_min_sync", value,
                                   [](T a, T b) { return std::min(a, b); });
}
template <typename T>
EMULATED T __reduce_max_sync(unsigned mask, T value) {
  return diffmic::emulator::Reduce(mask, "__reduce_max_sync", value,
                                   [](T a, T b) { return std::max(a, b); });
}

// ---- relaxed atomics ---------------------------------------------------------------------------

#define EMULATED_ATOMIC(name, expression)                                                  \
  template <typename T>                                                                    \
  __attribute__((no_sanitize("thread"), noinline)) T name(T* address,                      \
                                                          std::type_identity_t<T> value) { \
    static_assert(std::is_integral_v<T>, "floating atomics have no order");                \
    diffmic::emulator::Atomic(address, sizeof(T), diffmic::emulator::Order::kRelaxed);     \
    const T before = *address;                                                             \
    *address = static_cast<T>(expression);                                                 \
    return before;                                                                         \
  }
EMULATED_ATOMIC(atomicAdd, before + value)
EMULATED_ATOMIC(atomicSub, before - value)
EMULATED_ATOMIC(atomicMin, value < before ? value : before)
EMULATED_ATOMIC(atomicMax, value > before ? value : before)
EMULATED_ATOMIC(atomicAnd, before& value)
EMULATED_ATOMIC(atomicOr, before | value)
EMULATED_ATOMIC(atomicXor, before ^ value)
EMULATED_ATOMIC(atomicExch, value)
template <typename T>
__attribute__((no_sanitize("thread"), noinline)) T atomicCAS(T* address,
                                                             std::type_identity_t<T> compare,
                                                             std::type_identity_t<T> value) {
  diffmic::emulator::Atomic(address, sizeof(T), diffmic::emulator::Order::kRelaxed);
  const T before = *address;
  if (before == compare) *address = value;
  return before;
}

// ---- arithmetic --------------------------------------------------------------------------------

EMULATED float __fadd_rn(float a, float b) { return a + b; }
EMULATED float __fsub_rn(float a, float b) { return a - b; }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED float __fdiv_rn(float a, float b) { return a / b; }
EMULATED float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
EMULATED float __fsqrt_rn(float a) { return std::sqrt(a); }
EMULATED double __dadd_rn(double a, double b) { return a + b; }
EMULATED double __dsub_rn(double a, double b) { return a - b; }
EMULATED double __dmul_rn(double a, double b) { return a * b; }
EMULATED double __ddiv_rn(double a, double b) { return a / b; }
EMULATED double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
EMULATED double __dsqrt_rn(double a) { return std::sqrt(a); }
EMULATED float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
EMULATED double rsqrt(double a) { return 1.0 / std::sqrt(a); }
EMULATED float __expf(float a) { return std::exp(a); }
EMULATED float __logf(float a) { return std::log(a); }
EMULATED float __saturatef(float a) { return std::fmin(std::fmax(a, 0.0f), 1.0f); }
EMULATED float __int2float_rn(int a) { return static_cast<float>(a); }
EMULATED int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
EMULATED float __double2float_rn(double a) { return static_cast<float>(a); }
EMULATED int __popc(unsigned a) { return std::popcount(a); }
EMULATED int __popcll(unsigned long long a) { return std::popcount(a); }
EMULATED int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
EMULATED int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
EMULATED int __ffs(int a) { return a == 0 ? 0 : std::countr_zero(static_cast<unsigned>(a)) + 1; }
EMULATED int __ffsll(long long a) {
  return a == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(a)) + 1;
}
EMULATED unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
  return reversed;
}
EMULATED unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
EMULATED float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
EMULATED unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
EMULATED float __int_as_float(int a) { return std::bit_cast<float>(a); }
EMULATED int __float_as_int(float a) { return std::bit_cast<int>(a); }
EMULATED double __longlong_as_double(long long a) { return std::bit_cast<double>(a); }
EMULATED long long __double_as_longlong(double a) { return std::bit_cast<long long>(a); }
template <typename T, typename U>
EMULATED auto min(T a, U b) {
  using Wider = std::common_type_t<T, U>;
  return static_cast<Wider>(b) < static_cast<Wider>(a) ? static_cast<Wider>(b)
                                                       : static_cast<Wider>(a);
}
template <typename T, typename U>
EMULATED auto max(T a, U b) {
  using Wider = std::common_type_t<T, U>;
  return static_cast<Wider>(a) < static_cast<Wider>(b) ? static_cast<Wider>(b)
                                                       : static_cast<Wider>(a);
}
template <typename T>
EMULATED T __ldg(const T* address) {
  return *address;
}
template <typename T>
EMULATED T __ldcg(const T* address) {
  return *address;
}
template <typename T>
EMULATED T __ldcs(const T* address) {
  return *address;
}
template <typename T>
EMULATED void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
EMULATED void __stcs(T* address, T value) {
  *address = value;
}

// ---- the runtime -------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

#endif  // DIFFMIC_EMULATOR_CUDA_RUNTIME_H_
