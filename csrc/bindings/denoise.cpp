// Bindings of `denoise`, for the CPU and CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/denoise_names.h"
#include "cpu/denoise/denoise.h"
#include "include/denoise_call.h"
#include "include/philox.h"
#if DIFFMIC_WITH_CUDA
#include "cuda/common/error.h"
#include "cuda/denoise/denoise.h"
#endif

namespace py = pybind11;

namespace diffmic {
namespace {

constexpr char kOperation[] = "denoise";

void CheckRange(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) {
    throw py::value_error(
        Text(kOperation, ": ", name, " must be in [", low, ", ", high, "], got ", value));
  }
}

// The arguments of a call, read from a `Call` of diffmic_fast/ops/denoise.py.
DenoiseCall ReadCall(Arrays& arrays, const py::handle& record, py::handle out,
                     py::handle trajectory, Place place) {
  const TensorView& x = arrays.Input(record.attr("features"), "features", {DType::kFloat32});
  const TensorView& prior = arrays.Input(record.attr("prior"), "prior", {DType::kFloat32});
  x.OfRank(2, "[M, F]");
  prior.OfRank(2, "[M, C]");
  DenoiseCall call{};
  call.rows = x.size(0);
  DenoiserWeights& weights = call.weights;
  const std::int64_t features = weights.features = x.size(1);
  const std::int64_t classes = weights.classes = prior.size(1);
  if (features < 1) throw py::value_error(Text(kOperation, ": features must have columns"));
  CheckRange("the number of classes", classes, 1, philox::kMaxClasses);
  call.features = arrays.Rows(record.attr("features"), "features", {call.rows, features},
                              &call.features_stride);
  call.prior = arrays.Contiguous<float>(record.attr("prior"), "prior", {call.rows, classes});
  call.guidance =
      arrays.Contiguous<float>(record.attr("guidance"), "guidance", {call.rows, classes});

  constexpr std::array kLayers{"conditioning", "hidden_1", "hidden_2"};
  const auto eps = record.attr("eps").cast<std::array<double, 3>>();
  for (std::size_t i = 0; i < kLayers.size(); ++i) {
    ConditionalLayer& layer = weights.layers[i];
    layer = arrays.Layer(record.attr(kLayers[i]), kLayers[i], features,
                         i == 0 ? 2 * classes : features, eps[i]);
    const bool one_column = i > 0 && features == 1;
    if (!one_column && layer.weight_stride[1] != 1) {
      arrays.Fail(kLayers[i], "must have a weight with rows of unit stride");
    }
    if (layer.gamma_rows != weights.layers[0].gamma_rows) {
      arrays.Fail(kLayers[i], "must have a gamma of as many timesteps as the first layer");
    }
  }
  weights.output_weight = arrays.Rows(record.attr("output_weight"), "output_weight",
                                      {classes, features}, &weights.output_stride);
  weights.output_bias =
      arrays.Contiguous<float>(record.attr("output_bias"), "output_bias", {classes});

  StepTable& steps = call.steps;
  const TensorView& timesteps =
      arrays.Input(record.attr("timesteps"), "timesteps", {DType::kInt64}).OfRank(1, "[n]");
  steps.count = timesteps.size(0);
  steps.timesteps =
      arrays.Contiguous<std::int64_t>(record.attr("timesteps"), "timesteps", {steps.count});
  steps.coefficients =
      arrays.Contiguous<float>(record.attr("coefficients"), "coefficients", {7, steps.count});
  steps.start = record.attr("start").cast<std::int64_t>();
  CheckRange("steps.start", steps.start, 0, philox::kMaxTimestep);
  if (record.attr("noise").is_none()) {
    call.seed = PyLong_AsUnsignedLongLongMask(record.attr("seed").ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    const auto ids = [&](const char* name) {
      return arrays.Contiguous<std::int64_t>(record.attr(name), name, {call.rows});
    };
    call.image_ids = ids("image_ids");
    call.sample_ids = ids("sample_ids");
  } else {
    if (steps.count < 1) arrays.Fail("noise", "must have at least one step, for the initial state");
    call.noise =
        arrays.Contiguous<float>(record.attr("noise"), "noise", {steps.count, call.rows, classes});
  }
  call.out = arrays.Output<float>(out, "out", {call.rows, classes});
  call.trajectory =
      arrays.OptionalOutput<float>(trajectory, "trajectory", {steps.count + 1, call.rows, classes});
  call.precision = ReadPrecision(kOperation, record.attr("precision").cast<std::string>(), place);
  call.window = record.attr("window").cast<std::int64_t>();
  call.tolerance = record.attr("tolerance").cast<float>();
  if (call.window < 1) {
    throw py::value_error(Text(kOperation, ": window must be at least 1, got ", call.window));
  }
  if (!(call.tolerance >= 0.0f)) {
    throw py::value_error(Text(kOperation, ": tolerance must be at least 0, got ", call.tolerance));
  }
  return call;
}

#if DIFFMIC_WITH_CPU

// Lets Python handle its signals and calls `progress`; an exception there stops the chain.
class PythonWatch {
 public:
  explicit PythonWatch(py::object progress) : progress_(std::move(progress)) {}

  bool operator()(std::int64_t done, std::int64_t total) {
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress_.is_none()) progress_(done, total);
      return true;
    } catch (...) {
      error_ = std::current_exception();
      return false;
    }
  }

  void Rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  py::object progress_;
  std::exception_ptr error_;
};

// What the CPU can check, whose arrays it can read. A GPU's are checked by ops/denoise.py.
void CheckValues(const DenoiseCall& call) {
  const StepTable& steps = call.steps;
  for (std::int64_t i = 0; i < steps.count; ++i) {
    CheckRange("steps.timesteps", steps.timesteps[i], 0, call.weights.layers[0].gamma_rows - 1);
  }
  if (call.noise != nullptr) {
    // noise[0] makes the beginning and noise[i] is z of step i - 1: there is none for the last.
    if (steps.count > 0 && !(steps.sigma()[steps.count - 1] == 0.0f)) {
      throw py::value_error(Text(kOperation, ": with noise, sigma of the last step must be 0, got ",
                                 steps.sigma()[steps.count - 1]));
    }
  } else {
    for (std::int64_t row = 0; row < call.rows; ++row) {
      CheckRange("sample_ids", call.sample_ids[row], 0, philox::kMaxSample);
    }
  }
  CheckRange("window", call.window, 1, cpu::kBlockRows);
  if (call.precision == Precision::kInt8) {
    CheckRange("the number of features with int8", call.weights.features, 1,
               cpu::kMostInt8Features);
  }
}

std::int64_t Denoise(py::handle record, py::handle out, py::handle trajectory, int threads,
                     py::object progress, cpu::WeightCache* cache) {
  CheckThreads(kOperation, threads);
  Arrays arrays(kOperation, Place::kHost);
  const DenoiseCall call = ReadCall(arrays, record, out, trajectory, Place::kHost);
  CheckValues(call);
  PythonWatch watch(std::move(progress));
  std::int64_t sweeps = 0;
  cpu::DenoiseOptions options;
  options.kernels = FindKernels(record.attr("instructions").cast<std::string>(), call.precision);
  options.threads = threads;
  options.cache = cache;
  options.sweeps = &sweeps;
  options.watch = [&watch](std::int64_t done, std::int64_t total) { return watch(done, total); };
  {
    const py::gil_scoped_release release;
    cpu::Denoise(call, options);
  }
  watch.Rethrow();
  return sweeps;
}

#endif  // DIFFMIC_WITH_CPU

#if DIFFMIC_WITH_CUDA

void CheckSizes(std::int64_t features, std::int64_t classes) {
  CheckRange("the number of features", features, 1, cuda::denoise::kMostFeatures);
  CheckRange("the number of classes", classes, 1, cuda::denoise::kMostClasses);
}

cuda::denoise::Shape PlanOn(std::int64_t features, std::int64_t classes, std::int64_t rows,
                            std::int64_t steps, std::int64_t window, const std::string& precision,
                            int device) {
  CheckSizes(features, classes);
  const cuda::DeviceGuard guard(kOperation, device);
  return cuda::denoise::Plan(features, classes, rows, steps, window,
                             ReadPrecision(kOperation, precision, Place::kDevice));
}

std::int64_t WorkspaceBytes(std::int64_t features, std::int64_t classes, std::int64_t rows,
                            std::int64_t steps, std::int64_t window, const std::string& precision,
                            int device) {
  return static_cast<std::int64_t>(
      PlanOn(features, classes, rows, steps, window, precision, device).workspace_bytes);
}

py::dict PlanInfo(std::int64_t features, std::int64_t classes, std::int64_t rows,
                  std::int64_t steps, std::int64_t window, const std::string& precision,
                  int device) {
  const cuda::denoise::Shape shape =
      PlanOn(features, classes, rows, steps, window, precision, device);
  using namespace py::literals;
  return py::dict("blocks"_a = shape.blocks, "row_tiles"_a = shape.row_tiles,
                  "shared_channels"_a = shape.shared_channels, "pass_tiles"_a = shape.pass_tiles,
                  "step_stages"_a = shape.step_stages, "slots"_a = shape.slots,
                  "resident"_a = shape.resident, "chains"_a = shape.chains,
                  "window"_a = shape.window, "shared_bytes"_a = shape.shared_bytes);
}

void DenoiseOnCuda(py::handle record, py::handle out, py::handle trajectory,
                   std::int64_t launch_sweeps, py::handle workspace_array,
                   const py::object& progress, std::uintptr_t stream) {
  if (launch_sweeps < 1) {
    throw py::value_error(
        Text(kOperation, ": launch_sweeps must be at least 1, got ", launch_sweeps));
  }
  Arrays arrays(kOperation, Place::kDevice);
  const DenoiseCall call = ReadCall(arrays, record, out, trajectory, Place::kDevice);
  CheckSizes(call.weights.features, call.weights.classes);
  const cuda::DeviceGuard guard(kOperation, arrays.device());
  const cuda::denoise::Shape shape =
      cuda::denoise::Plan(call.weights.features, call.weights.classes, call.rows, call.steps.count,
                          call.window, call.precision);
  auto* workspace = arrays.Output<std::uint8_t>(workspace_array, "workspace",
                                                {static_cast<std::int64_t>(shape.workspace_bytes)});
  if (call.rows == 0) return;
  cuda::denoise::Run run(call, shape, launch_sweeps, workspace,
                         reinterpret_cast<cudaStream_t>(stream));
  for (bool more = true; more;) {
    std::int64_t done = 0;
    {
      const py::gil_scoped_release release;
      more = run.Next();
      if (!progress.is_none()) done = run.Wait();
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, call.rows * call.steps.count);
  }
}

#endif  // DIFFMIC_WITH_CUDA

}  // namespace

#if DIFFMIC_WITH_CPU
void BindDenoise(py::module_& m) {
  using py::arg;
  py::class_<cpu::WeightCache>(
      m, "WeightCache", "Keeps a model's weights as `denoise` packs them, from call to call.")
      .def(py::init<>());
  m.def("denoise", &Denoise, arg("call"), arg("out"), arg("trajectory"), arg("threads") = 1,
        arg("progress") = py::none(), arg("cache") = py::none(),
        "Write y_0 [M, C] of a reverse chain into out, and every state [n + 1, M, C] into "
        "trajectory unless it is None; return the number of sweeps. call: ops.denoise.Call.");
  m.def("denoise_instructions", &cpu::DenoiseKernelNames,
        "The instruction sets that `denoise` has kernels for and this processor has, the one that "
        "\"auto\" takes first.");
  m.def("why_no_amx", &cpu::WhyNoAmx, "Why the AMX kernels cannot run, or \"\".");
}
#endif

#if DIFFMIC_WITH_CUDA
namespace cuda {
void BindDenoise(py::module_& m) {
  using py::arg;
  m.def("denoise", &DenoiseOnCuda, arg("call"), arg("out"), arg("trajectory"), arg("launch_sweeps"),
        arg("workspace"), arg("progress"), arg("stream"),
        "As the CPU's. A launch does up to `launch_sweeps` sweeps; with progress, each launch is "
        "waited for. workspace: uint8, of denoise_workspace bytes.");
  m.def("denoise_workspace", &WorkspaceBytes, arg("features"), arg("classes"), arg("rows"),
        arg("steps"), arg("window"), arg("precision"), arg("device"),
        "Bytes of workspace that `denoise` needs for these sizes.");
  m.def("denoise_plan", &PlanInfo, arg("features"), arg("classes"), arg("rows"), arg("steps"),
        arg("window"), arg("precision"), arg("device"),
        "The launch configuration of these sizes: csrc/cuda/denoise/denoise.h, Shape.");
}
}  // namespace cuda
#endif

}  // namespace diffmic
