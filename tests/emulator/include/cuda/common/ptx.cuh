// Replaces csrc/cuda/common/ptx.cuh, which documents each function.
#ifndef DIFFMIC_EMULATOR_CUDA_PTX_H_
#define DIFFMIC_EMULATOR_CUDA_PTX_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "emulator.h"

namespace diffmic::cuda {

void MmaBf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
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
EMULATED int Opaque(int value) { return value; }
EMULATED void SpinPause() { emulator::SpinPause(); }

}  // namespace diffmic::cuda

#endif  // DIFFMIC_EMULATOR_CUDA_PTX_H_
