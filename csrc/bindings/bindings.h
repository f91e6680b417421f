// What the files that bind operations share. Each binds one operation's functions into _C; a
// function there reads its arrays through TensorView, checks them in words, releases the GIL, and
// calls a kernel with pointers, sizes and strides. Outputs are arrays that the caller allocated.
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

// Those of the CUDA kernels, bound into _C.cuda.
namespace cuda {
void BindDenoise(pybind11::module_& m);
}

inline void CheckThreads(const char* operation, int threads) {
  if (threads < 1) {
    throw pybind11::value_error(Text(operation, ": threads must be at least 1, got ", threads));
  }
}

}  // namespace diffmic

#endif  // DIFFMIC_BINDINGS_BINDINGS_H_
