// Instructions that CUDA C++ has no name for, one small function each. All inline PTX of the
// package is here, and the emulator of tests/emulator/ stands in for this file with its own.
#ifndef DIFFMIC_CUDA_COMMON_PTX_CUH_
#define DIFFMIC_CUDA_COMMON_PTX_CUH_

#include <cstdint>

namespace diffmic::cuda {

// d += a b with a [16, 16], b [16, 8] of bfloat16, d [16, 8] float32, spread over a warp. With
// g = lane / 4 and t = lane % 4, two numbers a register, lower column or row in the lower half:
//   a[0], a[1]: rows g, g + 8 at columns 2t, 2t + 1; a[2], a[3]: the same rows at columns 2t + 8, +
//   9 b[0], b[1]: column g at rows 2t, 2t + 1 and 2t + 8, 2t + 9 d[0], d[1]: row g at columns 2t,
//   2t + 1; d[2], d[3]: row g + 8 there
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type")
__device__ __forceinline__ void MmaBf16(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes from global to shared memory without a register in between, past the first-level
// cache; both addresses are multiples of 16. The copy is there for the thread that asked for it
// after the WaitCopies that its group is waited for with, for others after a barrier behind that.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
}

// Ends this thread's group of copies; an empty group counts.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the newest `kLeft` groups of this thread are under way.
template <int kLeft>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r names the 16 bytes of row
// r of matrix i (a multiple of 16); afterwards r[i] holds, of matrix i, row lane / 4, columns 2
// (lane % 4) and + 1.
__device__ __forceinline__ void LoadMatrices(std::uint32_t (&r)[4], const void* shared) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Reads that see what other blocks have written: from the second-level cache, never from the first.
__device__ __forceinline__ uint4 LoadShared16(const void* global) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}
__device__ __forceinline__ float LoadSharedFloat(const float* global) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(global) : "memory");
  return value;
}

// A counter that blocks of one launch meet at. Release: all that the thread has written, or has
// seen written (__syncthreads before it counts), is there for whoever acquires the new value.
__device__ __forceinline__ std::uint32_t AddRelease(std::uint32_t* counter, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ std::uint32_t LoadAcquire(const std::uint32_t* counter) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// In the body of every loop that waits for another block.
__device__ __forceinline__ void SpinPause() { __nanosleep(20); }

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_PTX_CUH_
