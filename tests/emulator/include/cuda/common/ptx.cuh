// Stands in for csrc/cuda/common/ptx.cuh, which says what each does.
#ifndef DIFFMIC_EMULATOR_CUDA_PTX_H_
#define DIFFMIC_EMULATOR_CUDA_PTX_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "emulator.h"

namespace diffmic::cuda {

void MmaBf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void LoadMatrices(std::uint32_t (&r)[4], const void* shared);
std::uint32_t AddRelease(std::uint32_t* counter, std::uint32_t value);
std::uint32_t LoadAcquire(const std::uint32_t* counter);

EMULATED void CopyAsync16(void* shared, const void* global) {
  emulator::CopyAsync(shared, global, 16);
}
EMULATED void CommitCopies() { emulator::CommitCopies(); }
template <int kLeft>
EMULATED void WaitCopies() {
  emulator::WaitCopies(kLeft);
}
EMULATED uint4 LoadShared16(const void* global) { return *static_cast<const uint4*>(global); }
EMULATED float LoadSharedFloat(const float* global) { return *global; }
EMULATED void SpinPause() { emulator::SpinPause(); }

}  // namespace diffmic::cuda

#endif  // DIFFMIC_EMULATOR_CUDA_PTX_H_
