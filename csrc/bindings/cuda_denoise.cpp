// Bindings of `denoise` on a GPU; the twin of csrc/bindings/denoise.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/cuda_bindings.h"
#include "cuda/common/error.h"
#include "cuda/denoise/denoise.h"
#include "include/philox.h"
#include "include/tensor_view.h"
#include "include/text.h"

namespace py = pybind11;

namespace diffmic::cuda {
namespace {

constexpr char kOperation[] = "denoise";
constexpr std::array kLayerNames{"conditioning", "hidden 1", "hidden 2"};

// Reads arrays of one device and keeps them alive for the call.
class Arrays {
 public:
  const TensorView& Add(TensorView view, DType type, std::initializer_list<std::int64_t> shape) {
    views_.push_back(std::move(view));
    views_.back().OfType({type}).OfShape(shape).OnDeviceOf(views_.front());
    return views_.back();
  }

  // The address of a compact array.
  template <typename T>
  const T* Compact(py::handle array, const char* name, DType type,
                   std::initializer_list<std::int64_t> shape) {
    const TensorView& view =
        Add(TensorView::Input(array, kOperation, name, Place::kDevice), type, shape);
    if (!view.is_compact()) Fail(name, "must be compact and row-major");
    return view.data_as<T>();
  }
  const float* Floats(py::handle array, const char* name,
                      std::initializer_list<std::int64_t> shape) {
    return Compact<float>(array, name, DType::kFloat32, shape);
  }

  // The address of a matrix whose rows have unit stride.
  const float* Rows(py::handle array, const char* name, std::initializer_list<std::int64_t> shape,
                    std::int64_t* stride) {
    const TensorView& view =
        Add(TensorView::Input(array, kOperation, name, Place::kDevice), DType::kFloat32, shape);
    if (view.size(1) > 1 && view.stride(1) != 1) Fail(name, "must have rows of unit stride");
    *stride = view.stride(0);
    return view.data_as<float>();
  }

  template <typename T>
  T* Written(py::handle array, const char* name, DType type,
             std::initializer_list<std::int64_t> shape) {
    const TensorView& view =
        Add(TensorView::Output(array, kOperation, name, Place::kDevice), type, shape);
    for (std::size_t i = 0; i + 1 < views_.size(); ++i) view.ApartFrom(views_[i]);
    return view.mutable_data_as<T>();
  }

  int device() const { return views_.front().device(); }

 private:
  [[noreturn]] static void Fail(const char* name, const char* what) {
    throw py::value_error(Text(kOperation, ": ", name, " ", what));
  }

  std::vector<TensorView> views_;
};

denoise::Precision ReadPrecision(const std::string& name) {
  if (name == "fp32") return denoise::Precision::kFloat32;
  if (name == "bf16") return denoise::Precision::kBFloat16;
  if (name == "fp8") return denoise::Precision::kFloat8;
  throw py::value_error(Text(kOperation, ": precision must be fp32, bf16 or fp8, got ", name));
}

void CheckSizes(std::int64_t features, std::int64_t classes) {
  if (features < 1 || features > denoise::kMostFeatures || classes < 1 ||
      classes > denoise::kMostClasses) {
    throw py::value_error(Text(kOperation, ": features must be 1 to ", denoise::kMostFeatures,
                               " and classes 1 to ", denoise::kMostClasses, ", got ", features,
                               " and ", classes));
  }
}

void ReadLayers(Arrays& arrays, const py::sequence& layers, const std::array<double, 3>& eps,
                denoise::Weights* weights) {
  if (py::len(layers) != 3) {
    throw py::value_error(Text(kOperation, ": layers must be three, got ", py::len(layers)));
  }
  const std::int64_t features = weights->features;
  std::int64_t timesteps = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto parts = layers[i].cast<py::sequence>();
    const char* name = kLayerNames[i];
    if (py::len(parts) != 7) {
      throw py::value_error(Text(kOperation, ": ", name, " must be seven arrays"));
    }
    denoise::Layer& layer = weights->layers[i];
    layer.weight = arrays.Rows(parts[0], name, {features, i == 0 ? 2 * weights->classes : features},
                               &layer.weight_stride);
    layer.bias = arrays.Floats(parts[1], name, {features});
    if (i == 0) {
      const auto gamma = TensorView::Input(parts[2], kOperation, name, Place::kDevice);
      gamma.OfRank(2, "[T + 1, F]");
      timesteps = gamma.size(0);
    }
    layer.gamma = arrays.Rows(parts[2], name, {timesteps, features}, &layer.gamma_stride);
    layer.norm_weight = arrays.Floats(parts[3], name, {features});
    layer.norm_bias = arrays.Floats(parts[4], name, {features});
    layer.running_mean = arrays.Floats(parts[5], name, {features});
    layer.running_var = arrays.Floats(parts[6], name, {features});
    layer.eps = static_cast<float>(eps[i]);
  }
}

std::int64_t WorkspaceBytes(std::int64_t features, std::int64_t classes, std::int64_t rows,
                            std::int64_t steps, std::int64_t window, const std::string& precision,
                            int device) {
  CheckSizes(features, classes);
  const DeviceGuard guard(kOperation, device);
  return static_cast<std::int64_t>(
      denoise::Plan(features, classes, rows, steps, window, ReadPrecision(precision))
          .workspace_bytes);
}

void Denoise(py::handle features_array, py::handle prior_array, py::handle guidance,
             const py::sequence& layers, const std::array<double, 3>& eps, py::handle output_weight,
             py::handle output_bias, py::handle timesteps, py::handle table, std::int64_t start,
             py::handle noise, std::uint64_t seed, py::handle images, py::handle samples,
             py::handle out, py::handle trajectory, const std::string& precision,
             std::int64_t window, float tolerance, std::int64_t sweeps, py::handle workspace_array,
             const py::object& progress, std::uintptr_t stream) {
  const auto x = TensorView::Input(features_array, kOperation, "features", Place::kDevice);
  const auto p = TensorView::Input(prior_array, kOperation, "prior", Place::kDevice);
  const auto moments = TensorView::Input(timesteps, kOperation, "timesteps", Place::kDevice);
  x.OfRank(2, "[M, F]");
  p.OfRank(2, "[M, C]");
  moments.OfRank(1, "[n]");
  const std::int64_t rows = x.size(0), features = x.size(1), classes = p.size(1);
  CheckSizes(features, classes);
  if (window < 1 || sweeps < 1 || !(tolerance >= 0.0f)) {
    throw py::value_error(Text(kOperation, ": window and sweeps must be at least 1 and tolerance ",
                               "not negative, got ", window, ", ", sweeps, " and ", tolerance));
  }
  Arrays arrays;
  denoise::Chain chain{};
  chain.rows = rows;
  chain.features =
      arrays.Rows(features_array, "features", {rows, features}, &chain.features_stride);
  chain.prior = arrays.Floats(prior_array, "prior", {rows, classes});
  chain.guidance = arrays.Floats(guidance, "guidance", {rows, classes});
  denoise::Weights weights{};
  weights.features = features;
  weights.classes = classes;
  ReadLayers(arrays, layers, eps, &weights);
  weights.output_weight =
      arrays.Rows(output_weight, "output_weight", {classes, features}, &weights.output_stride);
  weights.output_bias = arrays.Floats(output_bias, "output_bias", {classes});
  denoise::Steps steps{};
  steps.count = moments.size(0);
  steps.timesteps =
      arrays.Compact<std::int64_t>(timesteps, "timesteps", DType::kInt64, {steps.count});
  steps.table = arrays.Floats(table, "table", {7, steps.count});
  steps.start = start;
  if (noise.is_none()) {
    chain.seed = seed;
    chain.images = arrays.Compact<std::int64_t>(images, "image_ids", DType::kInt64, {rows});
    chain.samples = arrays.Compact<std::int64_t>(samples, "sample_ids", DType::kInt64, {rows});
  } else {
    chain.noise = arrays.Floats(noise, "noise", {steps.count, rows, classes});
  }
  chain.out = arrays.Written<float>(out, "out", DType::kFloat32, {rows, classes});
  if (!trajectory.is_none()) {
    chain.trajectory = arrays.Written<float>(trajectory, "trajectory", DType::kFloat32,
                                             {steps.count + 1, rows, classes});
  }
  denoise::Options options;
  options.precision = ReadPrecision(precision);
  options.tolerance = tolerance;
  options.sweeps = sweeps;
  const DeviceGuard guard(kOperation, arrays.device());
  const denoise::Shape shape =
      denoise::Plan(features, classes, rows, steps.count, window, options.precision);
  auto* workspace =
      arrays.Written<unsigned char>(workspace_array, "workspace", DType::kUInt8,
                                    {static_cast<std::int64_t>(shape.workspace_bytes)});
  if (rows == 0) return;
  denoise::Run run(weights, steps, chain, shape, options, workspace, AsStream(stream));
  for (bool more = true; more;) {
    std::int64_t done = 0;
    {
      const py::gil_scoped_release release;
      more = run.Next();
      if (!progress.is_none()) done = run.Wait();
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, rows * steps.count);
  }
}

}  // namespace

void BindDenoise(py::module_& m) {
  using py::arg;
  m.def("denoise", &Denoise, arg("features"), arg("prior"), arg("guidance"), arg("layers"),
        arg("eps"), arg("output_weight"), arg("output_bias"), arg("timesteps"), arg("table"),
        arg("start"), arg("noise"), arg("seed"), arg("image_ids"), arg("sample_ids"), arg("out"),
        arg("trajectory"), arg("precision"), arg("window"), arg("tolerance"), arg("sweeps"),
        arg("workspace"), arg("progress"), arg("stream"),
        "Write y_0 [M, C] of a whole reverse chain into out, and every state [n + 1, M, C] into "
        "trajectory; table [7, n] holds the columns of the steps. A launch takes up to `sweeps` "
        "readings of the weights; with progress, each is waited for.");
  m.def("denoise_workspace", &WorkspaceBytes, arg("features"), arg("classes"), arg("rows"),
        arg("steps"), arg("window"), arg("precision"), arg("device"),
        "Bytes of scratch memory that `denoise` wants for these sizes.");
}

}  // namespace diffmic::cuda
