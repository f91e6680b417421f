// Inline PTX of the package: instructions that CUDA C++ has no intrinsic for. The emulator of
// tests/emulator/ replaces this header with its own.
#ifndef DIFFMIC_CUDA_COMMON_PTX_CUH_
#define DIFFMIC_CUDA_COMMON_PTX_CUH_

#include <cstdint>

namespace diffmic::cuda {

// d += a b for a warp: a [16, 16] and b [16, 8] in bfloat16, d [16, 8] in float32. A register of a
// or b holds two elements, the one of the lower row or column in its lower half. With g = lane / 4
// and t = lane % 4:
//   a[0], a[1]  rows g and g + 8, columns 2t and 2t + 1
//   a[2], a[3]  the same rows, columns 2t + 8 and 2t + 9
//   b[0], b[1]  column g, rows 2t and 2t + 1; rows 2t + 8 and 2t + 9
//   d[0], d[1]  row g, columns 2t and 2t + 1
//   d[2], d[3]  row g + 8, the same columns
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type")
__device__ __forceinline__ void MmaBf16(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts an asynchronous copy of 16 bytes from global to shared memory that bypasses registers and
// the L1 cache. Both addresses must be multiples of 16. The data is visible to the calling thread
// after WaitCopies for its group, and to other threads after a barrier that follows that wait.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
}

// Commits this thread's copies since the last commit as one group, which may be empty.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `kLeft` most recent groups of this thread are in flight.
template <int kLeft>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Atomic addition with release semantics at device scope; returns the old value. All writes that
// this thread made or observed before it are visible to a thread that acquires the new value.
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

// Returns `value`, of which the compiler then knows nothing: it cannot hoist what is computed from
// it out of a loop, and hold that in registers which the rest of the loop needs.
__device__ __forceinline__ int Opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Backs off in a loop that polls another block. The emulator schedules other threads here.
__device__ __forceinline__ void SpinPause() { __nanosleep(20); }

}  // namespace diffmic::cuda

#endif  // DIFFMIC_CUDA_COMMON_PTX_CUH_
