#include "bindings/cuda_bindings.h"

namespace diffmic::cuda {

void BindAll(pybind11::module_& m) {
  m.doc() = "Kernels for GPUs, one function an operation.";
  BindConditioning(m);
  BindDenoise(m);
  BindMmd(m);
  BindRois(m);
}

}  // namespace diffmic::cuda
