// The module _emulated: the functions of diffmic_fast._C.cuda with emulated launches, and the
// submodule `emulator` with its settings and counters.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "cuda/common/shared_memory.h"
#include "emulator.h"
#include "traffic.h"

// The array of dynamic shared memory (csrc/cuda/common/launch.cuh), of the largest size of any GPU.
alignas(1024) thread_local unsigned char dynamic_shared[232448];

namespace py = pybind11;
namespace emulator = diffmic::emulator;

namespace {

void Configure(py::object seed, py::object preempt, py::object mode, py::object multiprocessors,
               py::object shared_per_block) {
  auto& config = emulator::config;
  if (!seed.is_none()) config.seed = seed.cast<std::uint32_t>();
  if (!preempt.is_none()) config.preempt = preempt.cast<int>();
  if (!multiprocessors.is_none()) config.multiprocessors = multiprocessors.cast<int>();
  if (!shared_per_block.is_none()) config.shared_per_block = shared_per_block.cast<int>();
  if (config.preempt < 0 || config.multiprocessors < 1 || config.shared_per_block < 1) {
    throw py::value_error("emulator: settings must be positive");
  }
  if (mode.is_none()) return;
  const auto name = mode.cast<std::string>();
  if (name == "plain") {
    config.mode = emulator::Mode::kPlain;
  } else if (name == "checked") {
    config.mode = emulator::Mode::kChecked;
  } else if (name == "counted") {
    config.mode = emulator::Mode::kCounted;
  } else {
    throw py::value_error("emulator: mode must be plain, checked or counted, got " + name);
  }
}

// [(l2, dram, copies)]
py::list Intervals(const emulator::Traffic& traffic) {
  py::list all;
  for (const auto& [loads, copies] : traffic.intervals) {
    all.append(py::make_tuple(loads.l2, loads.dram, copies));
  }
  return all;
}

py::dict Counters() {
  py::dict all;
  for (const auto& [name, t] : emulator::AllTraffic()) {
    using namespace py::literals;
    all[name.c_str()] = py::dict(
        "launches"_a = t.launches, "load_bytes"_a = t.load_bytes,
        "load_sector_bytes"_a = t.load_sector_bytes, "load_unique_bytes"_a = t.load_unique_bytes,
        "store_bytes"_a = t.store_bytes, "store_sector_bytes"_a = t.store_sector_bytes,
        "store_unique_bytes"_a = t.store_unique_bytes, "copy_bytes"_a = t.copy_bytes,
        "shared_wavefronts"_a = t.shared_wavefronts, "shared_ideal"_a = t.shared_ideal,
        "matrix_instructions"_a = t.matrix_instructions, "shuffles"_a = t.shuffles,
        "barriers"_a = t.barriers, "intervals"_a = Intervals(t));
  }
  return all;
}

py::list SharedLimits() {
  py::list all;
  for (const auto& [kernel, bytes] : emulator::SharedLimits()) {
    all.append(py::make_tuple(reinterpret_cast<std::uintptr_t>(kernel), bytes));
  }
  return all;
}

}  // namespace

#ifdef DIFFMIC_EMULATOR_SELFTEST
void BindSelftest(py::module_& m);
#define DIFFMIC_BIND BindSelftest
#else
#define DIFFMIC_BIND diffmic::cuda::BindAll
#endif

PYBIND11_MODULE(DIFFMIC_EMULATED_NAME, m) {
  using py::arg;
  py::register_exception<emulator::Fault>(m, "EmulatorFault", PyExc_RuntimeError);
  DIFFMIC_BIND(m);
  auto control = m.def_submodule("emulator", "Settings and counters of the emulator.");
  control.def("configure", &Configure, py::kw_only(), arg("seed") = py::none(),
              arg("preempt") = py::none(), arg("mode") = py::none(),
              arg("multiprocessors") = py::none(), arg("shared_per_block") = py::none(),
              "Change the given settings: the seed of the schedule; the mean number of accesses "
              "before a thread is preempted; the mode plain, checked or counted; the device's "
              "multiprocessors and its shared memory per block in bytes.");
  control.def("counters", &Counters,
              "Traffic of each kernel since the last reset, in mode counted.");
  control.def("shared_limits", &SharedLimits,
              "The limits of shared memory that launches have set so far, as (kernel, bytes).");
  control.def(
      "allow_shared_memory",
      [](std::uintptr_t kernel) {
        diffmic::cuda::AllowSharedMemory("test", reinterpret_cast<const void*>(kernel));
      },
      arg("kernel"), py::call_guard<py::gil_scoped_release>(),
      "What a launch of a kernel of this address does before it, if it needs the limit.");
  control.def("reset_counters", [] { emulator::AllTraffic().clear(); });
}
