// What the files that bind operations share. Each binds the functions of one operation, for the CPU
// into _C, for CUDA into _C.cuda. A function reads and checks its arrays (arrays.h), releases the
// GIL, and calls a kernel with pointers, sizes and strides. Outputs and workspaces are arrays that
// the caller allocated. Functions for CUDA take `stream`, a cudaStream_t as an integer, start their
// kernels on it, and do not synchronise.
#ifndef DIFFMIC_BINDINGS_BINDINGS_H_
#define DIFFMIC_BINDINGS_BINDINGS_H_

#include <pybind11/pybind11.h>

#include "include/text.h"
#if defined(DIFFMIC_EMULATED)  // tests/emulator: the CUDA kernels alone, on the host
#define DIFFMIC_WITH_CPU 0
#define DIFFMIC_WITH_CUDA 1
#else
#include "build_config.h"
#define DIFFMIC_WITH_CPU 1
#endif

namespace diffmic {

void BindConditioning(pybind11::module_& m);
void BindDenoise(pybind11::module_& m);
void BindMmd(pybind11::module_& m);
void BindNoise(pybind11::module_& m);
void BindProbes(pybind11::module_& m);
void BindRois(pybind11::module_& m);

namespace cuda {

void BindConditioning(pybind11::module_& m);
void BindDenoise(pybind11::module_& m);
void BindImageIds(pybind11::module_& m);
void BindMmd(pybind11::module_& m);
void BindRois(pybind11::module_& m);
void BindUpload(pybind11::module_& m);

inline void BindAll(pybind11::module_& m) {
  BindConditioning(m);
  BindDenoise(m);
  BindImageIds(m);
  BindMmd(m);
  BindRois(m);
  BindUpload(m);
}

}  // namespace cuda

inline void CheckThreads(const char* operation, int threads) {
  if (threads < 1) {
    throw pybind11::value_error(Text(operation, ": threads must be at least 1, got ", threads));
  }
}

}  // namespace diffmic

#endif  // DIFFMIC_BINDINGS_BINDINGS_H_
