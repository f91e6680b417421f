// The module diffmic_fast._C: one function an operation, each bound in a file of its own, and what
// the extension says about itself.
#include "bindings/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/common/cpu_capabilities.h"
#include "cpu/common/parallel.h"
#if DIFFMIC_WITH_CUDA
#include "cuda/common/device_query.h"
#include "cuda/common/error.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

py::dict BuildInfo() {
  py::dict info;
  info["version"] = DIFFMIC_VERSION;
  info["compiler"] = DIFFMIC_CXX_COMPILER;
  info["flags"] = DIFFMIC_CXX_FLAGS;
  info["architecture"] = cpu::Architecture();
  info["instruction_sets"] = cpu::AssumedInstructionSets();
  info["cuda"] = static_cast<bool>(DIFFMIC_WITH_CUDA);
  info["cuda_compiler"] = DIFFMIC_CUDA_COMPILER;
  info["cuda_architectures"] = DIFFMIC_CUDA_ARCHITECTURES;
  return info;
}

#if DIFFMIC_WITH_CUDA
py::dict CudaState() {
  cuda::State state;
  {
    const py::gil_scoped_release release;  // starting the driver can take seconds
    state = cuda::Query();
  }
  py::list devices;
  for (const cuda::Device& device : state.devices) {
    py::dict entry;
    entry["index"] = device.index;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    entry["served"] = device.served;
    devices.append(entry);
  }
  py::dict result;
  result["runtime_version"] = state.runtime_version;
  result["driver_version"] = state.driver_version;
  result["reason"] = state.reason;
  result["devices"] = devices;
  return result;
}
#endif

}  // namespace
}  // namespace diffmic

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using py::arg;
  m.doc() = "Kernels of diffmic_fast. The public calls are in diffmic_fast.ops.";
  diffmic::BindConditioning(m);
  diffmic::BindDenoise(m);
  diffmic::BindMmd(m);
  diffmic::BindNoise(m);
  diffmic::BindProbes(m);
  diffmic::BindRois(m);
  m.def("build_info", &diffmic::BuildInfo, "What this extension was built from, as a dict.");
  m.def(
      "forked", &diffmic::cpu::Forked,
      "Say that this process is a forked child, where the module was not loaded before the fork.");
  m.def("cpu_features", &diffmic::cpu::AvailableInstructionSets,
        "The instruction sets of this machine's processor.");
#if DIFFMIC_WITH_CUDA
  py::register_exception<diffmic::cuda::Error>(m, "CudaError", PyExc_RuntimeError);
  m.def("cuda_state", &diffmic::CudaState, "Driver and GPUs of this machine, as a dict.");
  m.def("cuda_serves", &diffmic::cuda::Serves, arg("architectures"), arg("major"), arg("minor"),
        "Whether code for these architectures runs on a GPU of this compute capability.");
  auto cuda = m.def_submodule("cuda", "Kernels for GPUs, one function an operation.");
  diffmic::cuda::BindAll(cuda);
#endif
}
