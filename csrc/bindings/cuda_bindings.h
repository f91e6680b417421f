// Functions of the CUDA kernels, bound into _C.cuda, and by tests/emulator/ into a module of the
// same functions that runs on the host. Each reads its arrays through TensorView (Place::kDevice),
// checks them in words, and starts its kernels on `stream`, a cudaStream_t as an integer, without
// waiting for them. Outputs and scratch memory are arrays that the caller allocated.
#ifndef DIFFMIC_BINDINGS_CUDA_BINDINGS_H_
#define DIFFMIC_BINDINGS_CUDA_BINDINGS_H_

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace diffmic::cuda {

inline cudaStream_t AsStream(std::uintptr_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

void BindConditioning(pybind11::module_& m);
void BindDenoise(pybind11::module_& m);
void BindMmd(pybind11::module_& m);
void BindRois(pybind11::module_& m);

void BindAll(pybind11::module_& m);

}  // namespace diffmic::cuda

#endif  // DIFFMIC_BINDINGS_CUDA_BINDINGS_H_
