// Where the kernels of a call run on a GPU.
#ifndef DIFFMIC_BINDINGS_CUDA_LAUNCH_H_
#define DIFFMIC_BINDINGS_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arrays.h"
#include "cuda/common/error.h"

namespace diffmic::cuda {

// The device of a call's arrays, and a stream.
class Launch {
 public:
  Launch(Arrays& arrays, std::uintptr_t stream)
      : arrays_(arrays), stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  // A workspace of `needed` elements or more; NULL if none is needed.
  template <typename T>
  T* Workspace(pybind11::handle array, std::int64_t needed, const char* name = "workspace") const {
    if (needed == 0) return nullptr;
    const TensorView& view = arrays_.Output(array, name, {DTypeOf<T>()});
    if (view.numel() < needed) {
      arrays_.Fail(name, Text("must have ", needed, " elements, got ", view.numel()).c_str());
    }
    // Workspaces of eight-byte elements are also read in pieces of 16 bytes.
    if (sizeof(T) == 8 && reinterpret_cast<std::uintptr_t>(view.data()) % 16 != 0) {
      arrays_.Fail(name, "must begin at a multiple of 16 bytes");
    }
    return view.template mutable_data_as<T>();
  }

  // Calls run(stream) without the GIL, with the device current.
  template <typename Run>
  void operator()(const Run& run) const {
    const pybind11::gil_scoped_release release;
    const DeviceGuard guard(arrays_.operation(), arrays_.device());
    run(stream_);
  }

 private:
  Arrays& arrays_;
  cudaStream_t stream_;
};

}  // namespace diffmic::cuda

#endif  // DIFFMIC_BINDINGS_CUDA_LAUNCH_H_
