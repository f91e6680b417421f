// Binding of copies from the host to a GPU that never wait for the device.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#if DIFFMIC_WITH_CUDA
#include "bindings/cuda_launch.h"
#include "cuda/common/upload.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

void UploadBytes(py::handle from_array, py::handle to_array, std::uintptr_t stream) {
  constexpr char kOperation[] = "upload";
  Arrays host(kOperation, Place::kHost);
  const TensorView& from = host.Input(from_array, "from", {DType::kUInt8}).OfRank(1, "[bytes]");
  const std::uint8_t* data = host.Contiguous<std::uint8_t>(from_array, "from", {from.size(0)});
  Arrays arrays(kOperation, Place::kDevice);
  auto* to = arrays.Output<std::uint8_t>(to_array, "to", {from.size(0)});
  if (reinterpret_cast<std::uintptr_t>(to) % 4 != 0) {
    arrays.Fail("to", "must begin at a multiple of 4 bytes");
  }
  const Launch launch(arrays, stream);
  launch([&](cudaStream_t on) { Upload(data, from.size(0), to, on); });
}

}  // namespace

void BindUpload(py::module_& m) {
  using py::arg;
  m.def("upload", &UploadBytes, arg("from"), arg("to"), arg("stream"),
        "Copies from [bytes] uint8 on the CPU to `to`, as large, by the parameters of kernels.");
}

}  // namespace diffmic::cuda
#endif
