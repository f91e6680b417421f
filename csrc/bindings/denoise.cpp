// Bindings of `denoise`.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/common/cpu_capabilities.h"
#include "cpu/common/parallel.h"
#include "cpu/denoise/denoise.h"
#include "cpu/denoise/denoise_probes.h"
#include "include/philox.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic {
namespace {

constexpr char kOperation[] = "denoise";
constexpr std::array kLayerNames{"conditioning", "hidden 1", "hidden 2"};

// Reads float32 (or int64) arrays and keeps them alive for the call.
class Arrays {
 public:
  const TensorView& Floats(py::handle array, const char* name,
                           std::initializer_list<std::int64_t> shape) {
    return Keep(TensorView::Input(array, kOperation, name), {DType::kFloat32}, shape);
  }
  const TensorView& Integers(py::handle array, const char* name,
                             std::initializer_list<std::int64_t> shape) {
    return Keep(TensorView::Input(array, kOperation, name), {DType::kInt64}, shape);
  }
  // The address of a vector, or of a matrix whose rows have unit stride.
  const float* Compact(py::handle array, const char* name,
                       std::initializer_list<std::int64_t> shape) {
    const TensorView& view = Floats(array, name, shape);
    if (!view.is_compact()) Fail(name, "must be compact and row-major");
    return view.data_as<float>();
  }
  const std::int64_t* CompactIntegers(py::handle array, const char* name,
                                      std::initializer_list<std::int64_t> shape) {
    const TensorView& view = Integers(array, name, shape);
    if (!view.is_compact()) Fail(name, "must be compact");
    return view.data_as<std::int64_t>();
  }
  const float* Rows(py::handle array, const char* name, std::initializer_list<std::int64_t> shape,
                    std::int64_t* stride) {
    const TensorView& view = Floats(array, name, shape);
    if (view.size(1) > 1 && view.stride(1) != 1) Fail(name, "must have rows of unit stride");
    *stride = view.stride(0);
    return view.data_as<float>();
  }

 private:
  const TensorView& Keep(TensorView view, std::initializer_list<DType> types,
                         std::initializer_list<std::int64_t> shape) {
    views_.push_back(std::make_unique<TensorView>(std::move(view)));
    views_.back()->OfType(types).OfShape(shape);
    return *views_.back();
  }
  [[noreturn]] static void Fail(const char* name, const char* what) {
    throw py::value_error(Text(kOperation, ": ", name, " ", what));
  }

  std::vector<std::unique_ptr<TensorView>> views_;
};

cpu::DenoiserWeights ReadWeights(Arrays& arrays, const py::sequence& layers,
                                 const std::array<double, 3>& eps, py::handle output_weight,
                                 py::handle output_bias, std::int64_t features,
                                 std::int64_t classes, std::int64_t* timesteps) {
  cpu::DenoiserWeights weights{};
  weights.features = features;
  weights.classes = classes;
  if (py::len(layers) != 3) {
    throw py::value_error(Text(kOperation, ": layers must be three, got ", py::len(layers)));
  }
  for (int i = 0; i < 3; ++i) {
    cpu::ConditionalLayerWeights& layer = weights.layers[i];
    const char* name = kLayerNames[static_cast<std::size_t>(i)];
    const auto parts = layers[static_cast<std::size_t>(i)].cast<py::sequence>();
    if (py::len(parts) != 7) {
      throw py::value_error(Text(kOperation, ": ", name, " must be seven arrays"));
    }
    layer.weight = arrays.Rows(parts[0], name, {features, i == 0 ? 2 * classes : features},
                               &layer.weight_stride);
    layer.bias = arrays.Compact(parts[1], name, {features});
    const auto gamma = TensorView::Input(parts[2], kOperation, name);
    gamma.OfRank(2, "[T + 1, F]");
    if (i == 0) *timesteps = gamma.size(0);
    layer.gamma = arrays.Rows(parts[2], name, {*timesteps, features}, &layer.gamma_stride);
    layer.norm_weight = arrays.Compact(parts[3], name, {features});
    layer.norm_bias = arrays.Compact(parts[4], name, {features});
    layer.running_mean = arrays.Compact(parts[5], name, {features});
    layer.running_var = arrays.Compact(parts[6], name, {features});
    layer.eps = eps[static_cast<std::size_t>(i)];
  }
  weights.output_weight =
      arrays.Rows(output_weight, "output_weight", {classes, features}, &weights.output_stride);
  weights.output_bias = arrays.Compact(output_bias, "output_bias", {classes});
  return weights;
}

cpu::Steps ReadSteps(Arrays& arrays, const py::sequence& table, std::int64_t start,
                     std::int64_t timesteps) {
  if (py::len(table) != 8) {
    throw py::value_error(Text(kOperation, ": steps must be eight arrays, got ", py::len(table)));
  }
  const std::int64_t count = static_cast<std::int64_t>(py::len(table[0]));
  std::array<const float*, 7> columns{};
  for (std::size_t i = 0; i < columns.size(); ++i) {
    columns[i] = arrays.Compact(table[i + 1], "steps", {count});
  }
  const cpu::Steps steps{count,      arrays.CompactIntegers(table[0], "steps.timesteps", {count}),
                         columns[0], columns[1],
                         columns[2], columns[3],
                         columns[4], columns[5],
                         columns[6], start};
  for (std::int64_t i = 0; i < count; ++i) {
    if (steps.timesteps[i] < 0 || steps.timesteps[i] >= timesteps) {
      throw py::value_error(Text(kOperation, ": steps.timesteps must be in [0, ", timesteps - 1,
                                 "], got ", steps.timesteps[i]));
    }
  }
  if (start < 0 || start > philox::kMaxTimestep) {
    throw py::value_error(
        Text(kOperation, ": steps.start must be in [0, ", philox::kMaxTimestep, "], got ", start));
  }
  return steps;
}

// Lets Python look at its signals, and at the progress; an exception there stops the chain.
class PythonWatch {
 public:
  explicit PythonWatch(py::object report) : report_(std::move(report)) {}

  bool operator()(std::int64_t done, std::int64_t total) {
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!report_.is_none()) report_(done, total);
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
  py::object report_;
  std::exception_ptr error_;
};

cpu::Precision ReadPrecision(const std::string& name) {
  if (name == "fp32") return cpu::Precision::kFloat32;
  if (name == "bf16") return cpu::Precision::kBFloat16;
  if (name == "int8") return cpu::Precision::kInt8;
  throw py::value_error(Text(kOperation, ": precision must be fp32, bf16 or int8, got ", name));
}

const cpu::DenoiseKernels* ReadKernels(const std::string& name, cpu::Precision precision) {
  const cpu::DenoiseKernels* kernels = cpu::FindDenoiseKernels(name, precision);
  if (kernels != nullptr) return kernels;
  if (name == "amx") {
    throw py::value_error(
        Text(kOperation, ": instructions=\"amx\" cannot be served: ", cpu::WhyNoAmx()));
  }
  std::string names = "auto";
  for (const std::string& known : cpu::DenoiseKernelNames()) names += ", " + known;
  throw py::value_error(Text(kOperation, ": instructions must be one of what this processor has (",
                             names, "), got ", name));
}

std::int64_t Denoise(py::handle features, py::handle prior, py::handle guidance,
                     const py::sequence& layers, const std::array<double, 3>& eps,
                     py::handle output_weight, py::handle output_bias,
                     const py::sequence& steps_table, std::int64_t start, py::handle noise,
                     const py::int_& seed, py::handle images, py::handle samples, py::handle out,
                     py::handle trajectory, const std::string& precision,
                     const std::string& instructions, int threads, py::object progress,
                     std::int64_t window, cpu::WeightCache* cache, float tolerance) {
  CheckThreads(kOperation, threads);
  Arrays arrays;
  const auto x = TensorView::Input(features, kOperation, "features");
  const auto p = TensorView::Input(prior, kOperation, "prior");
  x.OfRank(2, "[M, F]");
  p.OfRank(2, "[M, C]");
  const std::int64_t rows = x.size(0);
  const std::int64_t classes = p.size(1);
  if (x.size(1) < 1 || classes < 1 || classes > philox::kMaxClasses) {
    throw py::value_error(Text(kOperation, ": features and prior must have columns, the latter ",
                               philox::kMaxClasses, " at most, got ", x.size(1), " and ", classes));
  }
  std::int64_t timesteps = 0;
  const cpu::DenoiserWeights weights =
      ReadWeights(arrays, layers, eps, output_weight, output_bias, x.size(1), classes, &timesteps);
  const cpu::Steps steps = ReadSteps(arrays, steps_table, start, timesteps);
  cpu::Chain chain{};
  chain.rows = rows;
  chain.features = arrays.Rows(features, "features", {rows, x.size(1)}, &chain.features_stride);
  chain.prior = arrays.Compact(prior, "prior", {rows, classes});
  chain.guidance = arrays.Compact(guidance, "guidance", {rows, classes});
  if (noise.is_none()) {
    chain.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    chain.images = arrays.CompactIntegers(images, "image_ids", {rows});
    chain.samples = arrays.CompactIntegers(samples, "sample_ids", {rows});
    for (std::int64_t row = 0; row < rows; ++row) {
      if (chain.samples[row] < 0 || chain.samples[row] > philox::kMaxSample) {
        throw py::value_error(Text(kOperation, ": sample_ids must be in [0, ", philox::kMaxSample,
                                   "], got ", chain.samples[row]));
      }
    }
  } else {
    chain.noise = arrays.Compact(noise, "noise", {steps.count, rows, classes});
    // noise[0] makes the beginning and noise[i] is z of step i - 1: there is none for the last.
    if (steps.count > 0 && !(steps.sigma[steps.count - 1] == 0.0f)) {
      throw py::value_error(Text(kOperation,
                                 ": with noise, the last step must take none: its sigma is ",
                                 steps.sigma[steps.count - 1]));
    }
  }
  const auto result = TensorView::Output(out, kOperation, "out");
  result.OfType({DType::kFloat32}).OfShape({rows, classes});
  result.ApartFrom(x).ApartFrom(p);
  chain.out = result.mutable_data_as<float>();
  std::optional<TensorView> states;
  if (!trajectory.is_none()) {
    states = TensorView::Output(trajectory, kOperation, "trajectory");
    states->OfType({DType::kFloat32}).OfShape({steps.count + 1, rows, classes});
    chain.trajectory = states->mutable_data_as<float>();
  }
  PythonWatch watch(std::move(progress));
  cpu::DenoiseOptions options;
  options.precision = ReadPrecision(precision);
  if (options.precision == cpu::Precision::kInt8 && x.size(1) > cpu::kMostInt8Features) {
    throw py::value_error(Text(kOperation, ": with int8 there may be at most ",
                               cpu::kMostInt8Features, " features, got ", x.size(1)));
  }
  options.kernels = ReadKernels(instructions, options.precision);
  options.threads = threads;
  options.cache = cache;
  if (window < 1 || window > cpu::kBlockRows) {
    throw py::value_error(
        Text(kOperation, ": window must be in [1, ", cpu::kBlockRows, "], got ", window));
  }
  if (!(tolerance >= 0.0f)) {
    throw py::value_error(Text(kOperation, ": tolerance must not be negative, got ", tolerance));
  }
  std::int64_t sweeps = 0;
  options.window = window;
  options.tolerance = tolerance;
  options.sweeps = &sweeps;
  options.watch = [&watch](std::int64_t done, std::int64_t total) { return watch(done, total); };
  {
    const py::gil_scoped_release release;
    cpu::Denoise(weights, steps, chain, options);
  }
  watch.Rethrow();
  return sweeps;
}

void Softplus(py::handle in, py::handle out, const std::string& instructions) {
  const auto x = TensorView::Input(in, "softplus", "x");
  const auto y = TensorView::Output(out, "softplus", "out");
  x.OfType({DType::kFloat32}).OfRank(1, "[n]");
  y.OfType({DType::kFloat32}).OfShape({x.size(0)});
  if (x.size(0) > 1 && x.stride(0) != 1) throw py::value_error("softplus: x must be compact");
  ReadKernels(instructions, cpu::Precision::kFloat32)
      ->softplus(x.data_as<float>(), x.size(0), y.mutable_data_as<float>());
}

// The way of reading that read_probe uses, an index of kReaders: which one is fastest differs
// between processors, and with the number of threads.
std::atomic<int> chosen_reader{static_cast<int>(std::size(cpu::kReaders)) - 2};

float Read(const TensorView& x, int threads, const cpu::DenoiseKernels* kernels, int reader) {
  std::vector<float> sums(static_cast<std::size_t>(threads));
  cpu::ParallelFor(threads, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t first = x.numel() / threads * part;
      const std::int64_t last = part + 1 == threads ? x.numel() : first + x.numel() / threads;
      sums[static_cast<std::size_t>(part)] =
          kernels->read(x.data_as<float>() + first, last - first, reader);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

TensorView ReadProbeInput(py::handle array, const char* operation) {
  auto x = TensorView::Input(array, operation, "x");
  x.OfType({DType::kFloat32});
  if (!x.is_compact()) throw py::value_error(Text(operation, ": x must be compact"));
  return x;
}

float ReadProbe(py::handle array, int threads, const std::string& instructions) {
  const TensorView x = ReadProbeInput(array, "read_probe");
  CheckThreads("read_probe", threads);
  const cpu::DenoiseKernels* kernels = ReadKernels(instructions, cpu::Precision::kFloat32);
  const py::gil_scoped_release release;
  return Read(x, threads, kernels, chosen_reader);
}

std::string CalibrateReadProbe(py::handle array, int threads, const std::string& instructions) {
  using Clock = std::chrono::steady_clock;
  constexpr int kTrials = 5;
  const TensorView x = ReadProbeInput(array, "calibrate_read_probe");
  CheckThreads("calibrate_read_probe", threads);
  const cpu::DenoiseKernels* kernels = ReadKernels(instructions, cpu::Precision::kFloat32);
  int fastest = 0;
  {
    const py::gil_scoped_release release;
    auto least = Clock::duration::max();
    for (int trial = 0; trial < kTrials; ++trial) {
      for (int reader = 0; reader < static_cast<int>(std::size(cpu::kReaders)); ++reader) {
        const auto begin = Clock::now();
        Read(x, threads, kernels, reader);
        const auto took = Clock::now() - begin;
        if (took < least) {
          least = took;
          fastest = reader;
        }
      }
    }
    chosen_reader = fastest;
  }
  const cpu::Reader& reader = cpu::kReaders[fastest];
  return Text(reader.streams, " streams, ", reader.ahead, " bytes ahead");
}

float MultiplyAddProbe(std::int64_t count, int threads, const std::string& instructions,
                       const std::string& precision) {
  CheckThreads("multiply_add_probe", threads);
  const cpu::Precision of = ReadPrecision(precision);
  const cpu::DenoiseKernels* kernels = ReadKernels(instructions, of);
  const py::gil_scoped_release release;
  std::vector<float> sums(static_cast<std::size_t>(threads));
  cpu::ParallelFor(threads, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      sums[static_cast<std::size_t>(part)] = kernels->multiply_add(of, count / threads);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

}  // namespace

void BindDenoise(py::module_& m) {
  using py::arg;
  py::class_<cpu::WeightCache>(
      m, "WeightCache", "Keeps a model's weights as `denoise` packs them, from call to call.")
      .def(py::init<>());
  m.def("denoise", &Denoise, arg("features"), arg("prior"), arg("guidance"), arg("layers"),
        arg("eps"), arg("output_weight"), arg("output_bias"), arg("steps"), arg("start"),
        arg("noise"), arg("seed"), arg("image_ids"), arg("sample_ids"), arg("out"),
        arg("trajectory"), arg("precision") = "fp32", arg("instructions") = "auto",
        arg("threads") = 1, arg("progress") = py::none(), arg("window") = 1,
        arg("cache") = py::none(), arg("tolerance") = 0.0f,
        "Write y_0 [M, C] of a whole reverse chain into out, and every state [n + 1, M, C] into "
        "trajectory; return the number of sweeps.");
  m.def("denoise_instructions", &cpu::DenoiseKernelNames,
        "The instruction sets that `denoise` has kernels for and this processor has, the one that "
        "\"auto\" takes first.");
  m.def("why_no_amx", &cpu::WhyNoAmx, "Why the kernels with AMX's tiles cannot run, or \"\".");
  m.def("softplus", &Softplus, arg("x"), arg("out"), arg("instructions") = "auto",
        "softplus of x [n], as the kernels of `denoise` compute it; for tests.");
  m.def("read_probe", &ReadProbe, arg("x"), arg("threads") = 1, arg("instructions") = "auto",
        "Read an array and return its sum; what bounds `denoise` over few rows, for benchmarks.");
  m.def("calibrate_read_probe", &CalibrateReadProbe, arg("x"), arg("threads") = 1,
        arg("instructions") = "auto",
        "Time every way of reading that `read_probe` has on an array, larger than the caches; from "
        "then on the process uses the fastest. Return what it is.");
  m.def("multiply_add_probe", &MultiplyAddProbe, arg("count"), arg("threads") = 1,
        arg("instructions") = "auto", arg("precision") = "fp32",
        "Do `count` multiply-adds of random operands by the fastest instructions of a precision; "
        "what bounds `denoise` over many rows.");
}

}  // namespace diffmic
